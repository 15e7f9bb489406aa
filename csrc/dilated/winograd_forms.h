// Filters of three taps with fewer products than taps, along one axis: the forms of which
// Winograd's convolution (winograd_cpu_plan.h) is made.
//
// A form computes a few neighbouring outputs  y[i] = sum over j of w[j] * x[i + j]  as
//
//     y = A ((G w) * (B x)),   the product in the middle element by element
//
// and its three matrices are all there is to it. The gradients are their transposes: of w
// G' ((A' grad_y) * (B x)). All elements are small multiples of powers of two, so that small
// integers stay exact, and of those forms these are the ones that round least.
//
// What two axes need are the products of all pairs. Sources: S. Winograd, Arithmetic Complexity of
// Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks,
// 2015. Points of kThree: B. Barabasz et al., Error Analysis and Improving the Accuracy of Winograd
// Convolution for Deep Neural Networks, 2020.
#pragma once

#include <cstdint>

namespace fastseg {
namespace winograd {

// Those that round least come first.
enum class Form : int32_t { kTwo = 0, kPair = 1, kTriple = 2, kThree = 3 };
constexpr int32_t kForms = 4;

// Of the kOutputs + 2 inputs that its outputs look at a form reads all, or leaves out the first and
// the last one: then kFirst is 1.

// F(2, 3): polynomials at 0, 1, -1 and infinity.
struct Two {
  static constexpr int64_t kOutputs = 2, kFirst = 0, kInputs = 4, kProducts = 4;
  static constexpr float kDivisor = 1;
  static constexpr float kOfTaps[kProducts][3] = {
      {1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}};
  static constexpr float kOfInputs[kProducts][kInputs] = {
      {1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr float kOfProducts[kOutputs][kProducts] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
};

// An image of two pixels, with padding on both sides: a Toeplitz matrix of two rows.
struct Pair {
  static constexpr int64_t kOutputs = 2, kFirst = 1, kInputs = 2, kProducts = 3;
  static constexpr float kDivisor = 1;
  static constexpr float kOfTaps[kProducts][3] = {{0, 1, 0}, {1, -1, 0}, {0, -1, 1}};
  static constexpr float kOfInputs[kProducts][kInputs] = {{1, 1}, {1, 0}, {0, 1}};
  static constexpr float kOfProducts[kOutputs][kProducts] = {{1, 0, 1}, {1, 1, 0}};
};

// An image of three pixels, with padding on both sides: a cyclic convolution of length 4, by
// polynomials at 1, -1 and i, where a complex product takes three real ones.
struct Triple {
  static constexpr int64_t kOutputs = 3, kFirst = 1, kInputs = 3, kProducts = 5;
  static constexpr float kDivisor = 1;
  static constexpr float kOfTaps[kProducts][3] = {{0.25f, 0.25f, 0.25f},
                                                  {-0.25f, 0.25f, -0.25f},
                                                  {0, 0.5f, 0},
                                                  {0.5f, 0.5f, -0.5f},
                                                  {0.5f, -0.5f, -0.5f}};
  static constexpr float kOfInputs[kProducts][kInputs] = {
      {1, 1, 1}, {1, -1, 1}, {1, 1, -1}, {0, 1, 0}, {1, 0, -1}};
  static constexpr float kOfProducts[kOutputs][kProducts] = {
      {1, 1, 1, -1, 0}, {1, -1, 1, 0, 1}, {1, 1, -1, 1, 0}};
};

// F(3, 3): polynomials at 0, 1/2, -1, 2 and infinity. Twice as far off as kTwo, and its results are
// to be divided by nine: not multiplied by a ninth, which would round integers.
struct Three {
  static constexpr int64_t kOutputs = 3, kFirst = 0, kInputs = 5, kProducts = 5;
  static constexpr float kDivisor = 9;
  static constexpr float kOfTaps[kProducts][3] = {
      {9, 0, 0}, {4, 2, 1}, {1, -1, 1}, {1, 2, 4}, {0, 0, 9}};
  static constexpr float kOfInputs[kProducts][kInputs] = {{1, -1.5f, -1.5f, 1, 0},
                                                          {0, 1, 0.5f, -0.5f, 0},
                                                          {0, -2, 5, -2, 0},
                                                          {0, -0.5f, 0.5f, 1, 0},
                                                          {0, 1, -1.5f, -1.5f, 1}};
  static constexpr float kOfProducts[kOutputs][kProducts] = {
      {1, 4, 1, 1, 0}, {0, 2, -1, 2, 0}, {0, 1, 1, 4, 1}};
};

inline const char* name_of(Form form) {
  constexpr const char* kNames[kForms] = {"two", "pair", "triple", "three"};
  return kNames[static_cast<int32_t>(form)];
}

// What the host knows of a form.
struct FormSize {
  int64_t outputs, first, inputs, products;
};
constexpr FormSize size_of(Form form) {
  constexpr auto of = [](auto f) { return FormSize{f.kOutputs, f.kFirst, f.kInputs, f.kProducts}; };
  constexpr FormSize kSizes[kForms] = {of(Two{}), of(Pair{}), of(Triple{}), of(Three{})};
  return kSizes[static_cast<int32_t>(form)];
}

}  // namespace winograd
}  // namespace fastseg
