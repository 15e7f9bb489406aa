"""Drop-in modules of torch.nn: same constructor order, same parameter names."""

from fastseg.nn.conv import Conv2d

__all__ = ["Conv2d"]
