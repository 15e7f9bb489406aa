// What other CPU families need of batch norm.
#pragma once

#include <ATen/ATen.h>

namespace fastseg {

// Of every channel of y [N, K, H, W] the sum and the sum of squares over images and pixels, as
// float64 [2, K]: the batch statistics of a norm. In a fixed order, whatever the threads.
at::Tensor channel_sums(const at::Tensor& y);

}  // namespace fastseg
