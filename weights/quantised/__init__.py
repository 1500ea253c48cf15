"""The formats of quantised checkpoints in safetensors files, one file each: which stored tensors belong together, and
what is computed from them. docs/quantised.md lists them."""
