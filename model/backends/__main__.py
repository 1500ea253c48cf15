"""Prints which kernels models run on here: `python -m model.backends`. Nothing is compiled."""

from model.backends.cpu.kernels.library import load

if __name__ == "__main__":
    try:
        kernels = load()
        print(f"{kernels.name}, {kernels.origin or kernels.reason}")
    except ValueError as error:
        print(error)
