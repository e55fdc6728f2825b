"""The vendor's side before anything is served: data sets, backbones, training, artefacts."""
