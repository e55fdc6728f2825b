"""The gateway: thin callers send plaintext to it, and it alone speaks to the vendor, encrypted.

It runs inside the data owner's own perimeter: it sees every text. docs/gateway.md says where it may
run, and how an application switches to it. Its modules need `pip install 'veilhead[gateway]'`, and
nothing else of the client imports them.
"""
