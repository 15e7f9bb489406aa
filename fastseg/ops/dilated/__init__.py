"""Dense convolution (groups == 1) at any dilation; `fastseg.ops.conv2d` is its public function."""

from fastseg.ops.dilated import op as _op  # noqa: F401  registers the operators
