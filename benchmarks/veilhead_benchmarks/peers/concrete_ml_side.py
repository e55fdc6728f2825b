"""Concrete ML's two ways, measured inside its own environment: run by `concrete_ml.py` as a script.

It imports nothing of this project, since that is not installed there. The head comes as a file of
numpy arrays, and what was measured goes to a JSON file: Concrete ML prints what it likes.

- `concrete-ml-logreg`: `LogisticRegression` with the head's weights, quantised to eight bits,
  compiled, saved, and used through `FHEModelClient` and `FHEModelServer`. Of two classes it holds
  one row, their difference, as scikit-learn does.
- `concrete-ml-glwe`: the encrypted matrix product of its extensions, quantised and called as its
  hybrid models do it; their own class takes such products only from 512 features and outputs on.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable  # noqa: UP035  # as old a Python as Concrete ML takes

import numpy

_BITS = 8
_COMPILED_ON = 200


def _timed(call: Callable[[], Any], calls: int) -> tuple[float, Any]:
    """The median of the call's milliseconds after one that does not count, and its last value."""
    value = call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3, value


def _unit_rows(rows: int, dimensions: int) -> Any:
    """Embeddings that the quantisation is calibrated on: [rows, d]."""
    embeddings = numpy.random.default_rng(7).normal(size=(rows, dimensions))
    return embeddings / numpy.linalg.norm(embeddings, axis=1, keepdims=True)


def logistic_regression(weight: Any, bias: Any, embeddings: Any, calls: int) -> dict[str, Any]:
    """One text through Concrete ML's client and server."""
    from concrete.ml.deployment import FHEModelClient, FHEModelDev, FHEModelServer
    from concrete.ml.sklearn import LogisticRegression
    from sklearn.linear_model import LogisticRegression as PlainRegression

    classes, dimensions = weight.shape
    if classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    plain = PlainRegression()
    plain.coef_, plain.intercept_ = weight, bias
    plain.classes_ = numpy.arange(classes)
    plain.n_features_in_ = dimensions
    plain.n_iter_ = numpy.array([1])
    calibration = numpy.concatenate([_unit_rows(_COMPILED_ON, dimensions), embeddings])
    model = LogisticRegression.from_sklearn_model(plain, calibration, n_bits=_BITS)
    model.compile(calibration)
    with tempfile.TemporaryDirectory() as name:
        deployed = str(Path(name) / "model")
        FHEModelDev(deployed, model).save()
        client = FHEModelClient(deployed, key_dir=str(Path(name) / "keys"))
        keys = client.get_serialized_evaluation_keys()
        server = FHEModelServer(deployed)
        server.load()
        encrypt_ms, query = _timed(lambda: client.quantize_encrypt_serialize(embeddings), calls)
        server_ms, reply = _timed(lambda: server.run(query, keys), calls)

        def decrypt() -> Any:
            return client.model.dequantize_output(client.deserialize_decrypt(reply))

        decrypt_ms, logits = _timed(decrypt, calls)
    return {
        "system": "concrete-ml-logreg",
        "parameters": f"{_BITS} bits",
        "server_ms": server_ms,
        "encrypt_ms": encrypt_ms,
        "decrypt_ms": decrypt_ms,
        "bytes_keys": len(keys),
        "bytes_up": len(query),
        "bytes_down": len(reply),
        "logits": numpy.asarray(logits).reshape(len(embeddings), -1).tolist(),
        "note": "one row, the difference of two classes" if classes == 2 else "",
    }


def glwe_product(weight: Any, bias: Any, embeddings: Any, calls: int) -> dict[str, Any]:
    """Texts through the encrypted matrix product of Concrete ML's extensions."""
    import concrete_ml_extensions as extensions

    parameters = extensions.MatmulCryptoParameters.deserialize(extensions.default_params())
    description = json.loads(extensions.default_params())
    private_key, own_key = extensions.create_private_key(parameters)
    keys = own_key.serialize()
    evaluation_key = extensions.deserialize_compression_key(keys)
    levels = 2**_BITS - 1
    half = 2 ** (_BITS - 1)
    matrix = weight.T  # [d, C]
    weight_scale = (matrix.max(axis=0) - matrix.min(axis=0)) / levels  # [C]
    weight_zero = numpy.round(-half - matrix.min(axis=0) / weight_scale)
    quantised = numpy.clip(numpy.round(matrix / weight_scale) + weight_zero, -half, half - 1)
    columns = quantised.sum(axis=0)
    served = numpy.ascontiguousarray(quantised.astype(numpy.int64).astype(numpy.uint64))
    scale = (embeddings.max(axis=1) - embeddings.min(axis=1))[:, None] / levels  # [batch, 1]
    zero = numpy.round(-embeddings.min(axis=1)[:, None] / scale)

    def quantise() -> Any:
        return numpy.clip(numpy.round(embeddings / scale) + zero, 0, levels)

    def encrypt() -> bytes:
        data = numpy.ascontiguousarray(quantise().astype(numpy.uint64))
        encrypted = extensions.encrypt_matrix(pkey=private_key, crypto_params=parameters, data=data)
        return bytes(encrypted.serialize())

    def evaluate() -> bytes:
        encrypted = extensions.EncryptedMatrix.deserialize(query)
        product = extensions.matrix_multiplication(
            encrypted_matrix=encrypted, data=served, compression_key=evaluation_key
        )
        return bytes(product.serialize())

    def decrypt() -> Any:
        product = extensions.CompressedResultEncryptedMatrix.deserialize(reply)
        size = description["packing_ks_polynomial_size"]
        last = served.shape[1] % size or size
        raw = extensions.decrypt_matrix(product, private_key, parameters, last)
        sums = quantise().sum(axis=1)[:, None]
        correction = weight_zero * sums + zero * columns - zero * weight_zero * len(served)
        return (raw.astype(numpy.int64) - correction) * scale * weight_scale + bias

    encrypt_ms, query = _timed(encrypt, calls)
    server_ms, reply = _timed(evaluate, calls)
    decrypt_ms, logits = _timed(decrypt, calls)
    return {
        "system": "concrete-ml-glwe",
        "parameters": f"N={description['polynomial_size']}, {_BITS} bits",
        "server_ms": server_ms,
        "encrypt_ms": encrypt_ms,
        "decrypt_ms": decrypt_ms,
        "bytes_keys": len(keys),
        "bytes_up": len(query),
        "bytes_down": len(reply),
        "logits": numpy.asarray(logits).tolist(),
        "note": "weights' scales and zeros, public here, are left out of the bytes",
    }


def main(head_path: str, out_path: str, calls: str) -> None:
    """Measure both on the head of a file."""
    with numpy.load(head_path) as head:
        arguments = head["weight"], head["bias"], head["embeddings"], int(calls)
    measured = [logistic_regression(*arguments), glwe_product(*arguments)]
    Path(out_path).write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
