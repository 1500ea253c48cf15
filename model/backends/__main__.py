"""Prints torch's version and which kernels run here, a line each: `python -m model.backends`. Nothing is compiled."""

import torch

from model.backends.cpu.kernels.library import load

if __name__ == "__main__":
    print(torch.__version__)
    try:
        kernels = load()
        print(f"{kernels.name}, {kernels.origin or kernels.reason}")
    except ValueError as error:
        print(error)
