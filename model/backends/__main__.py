"""Prints torch's version and which kernels run here, a line each, those of GPUs where there are some:
`python -m model.backends`. Nothing is compiled."""

from importlib.metadata import version

import torch

from model.backends.cpu.kernels.library import load
from model.backends.cuda.backend import machine_refusal
from model.devices import CPU, devices
from model.options import Options

if __name__ == "__main__":
    print(torch.__version__)
    try:
        kernels = load()
        print(f"{kernels.name}, {kernels.origin or kernels.reason}")
    except ValueError as error:
        print(error)
    for device, name in devices().items():
        if device != CPU:
            print(f"{device}, {name}: {machine_refusal(Options(device=device)) or 'triton ' + version('triton')}")
