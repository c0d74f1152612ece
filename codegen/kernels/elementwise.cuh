// What stands between the products, one element at a time, in float32: each operation of codegen/expression.py and its
// gradient, by the formulas of PyTorch's derivatives.yaml and kernels, so that both agree at ties, at signed zeros, at
// infinities and for NaN.
//
//     float silu(float x)                            the value
//     float silu_backward(float g, float x, float y) g times the derivative at x, where the value is y
#pragma once
#include "ptx.cuh"

namespace elementwise {

#define OPERATION static __device__ __forceinline__ float

constexpr float SQRT_HALF = 0.70710678118654752440f, TWO_OVER_SQRT_PI = 1.12837916709551257390f;

// A cast to a narrower dtype: the nearest of its numbers, ties to even, as a float32.
OPERATION round_bf16(float x) { return ptx::round_bf16(x); }
OPERATION round_f16(float x) { return ptx::round_f16(x); }

// ---- one argument

OPERATION neg(float x) { return -x; }
OPERATION neg_backward(float g, float, float) { return -g; }
OPERATION exp(float x) { return expf(x); }
OPERATION exp_backward(float g, float, float y) { return g * y; }
OPERATION log(float x) { return logf(x); }
OPERATION log_backward(float g, float x, float) { return g / x; }
OPERATION log1p(float x) { return log1pf(x); }
OPERATION log1p_backward(float g, float x, float) { return g / (x + 1); }
OPERATION sqrt(float x) { return sqrtf(x); }
OPERATION sqrt_backward(float g, float, float y) { return g / (2 * y); }
OPERATION rsqrt(float x) { return 1 / sqrtf(x); }
OPERATION rsqrt_backward(float g, float, float y) { return -0.5f * g * (y * y * y); }
OPERATION reciprocal(float x) { return 1 / x; }
OPERATION reciprocal_backward(float g, float, float y) { return -g * (y * y); }
OPERATION sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
OPERATION sign_backward(float, float, float) { return 0; }
OPERATION abs(float x) { return fabsf(x); }
OPERATION abs_backward(float g, float x, float) { return g * sign(x); }
OPERATION square(float x) { return x * x; }
OPERATION square_backward(float g, float x, float) { return g * (2 * x); }
OPERATION erf(float x) { return erff(x); }
OPERATION erf_backward(float g, float x, float) { return TWO_OVER_SQRT_PI * expf(-(x * x)) * g; }
// Divisions and powers to the last bit would take half of an epilogue's time; what is computed here is rounded to 16 bits.
OPERATION sigmoid(float x) { return ptx::fast_reciprocal(1 + ptx::fast_exp(-x)); }
OPERATION sigmoid_backward(float g, float, float y) { return g * ((1 - y) * y); }
OPERATION tanh(float x) { return tanhf(x); }
OPERATION tanh_backward(float g, float, float y) { return g * (1 - y * y); }
OPERATION relu(float x) { return x <= 0 ? 0.0f : x; }
OPERATION relu_backward(float g, float, float y) { return y <= 0 ? 0.0f : g; }
OPERATION silu(float x) { return x * sigmoid(x); }
OPERATION silu_backward(float g, float x, float) {
    float s = sigmoid(x);
    return g * s * (1 + x * (1 - s));
}
OPERATION logsigmoid(float x) { return (x < 0 ? x : x != x ? x : 0.0f) - log1pf(expf(-fabsf(x))); }
OPERATION logsigmoid_backward(float g, float x, float) {
    bool negative = x < 0;
    float z = expf(-fabsf(x)), most = negative ? 1.0f : 0.0f, turn = negative ? 1.0f : -1.0f;
    return g * (most - turn * (z / (1 + z)));
}
OPERATION relu6(float x) { return x < 0 ? 0.0f : x > 6 ? 6.0f : x; }
OPERATION relu6_backward(float g, float x, float) { return x <= 0 || x >= 6 ? 0.0f : g; }
OPERATION hardsigmoid(float x) {
    float shifted = x + 3;
    return (shifted < 0 ? 0.0f : shifted > 6 ? 6.0f : shifted) / 6;
}
OPERATION hardsigmoid_backward(float g, float x, float) { return x > -3 && x < 3 ? g / 6 : 0.0f; }
OPERATION hardswish(float x) {
    float shifted = x + 3;
    return x * (shifted < 0 ? 0.0f : shifted > 6 ? 6.0f : shifted) / 6;
}
OPERATION hardswish_backward(float g, float x, float) { return x <= -3 ? 0.0f : x < 3 ? g * (x / 3 + 0.5f) : g; }
OPERATION mish(float x) { return x * tanhf(log1pf(expf(x))); }
OPERATION mish_backward(float g, float x, float) {
    float t = tanhf(log1pf(expf(x)));
    return g * (t + x * sigmoid(x) * (1 - t * t));
}
OPERATION gelu(float x) { return x * 0.5f * (1 + erff(x * SQRT_HALF)); }
OPERATION gelu_backward(float g, float x, float) {
    float below = 0.5f * (1 + erff(x * SQRT_HALF));
    float density = expf(-0.5f * x * x) * TWO_OVER_SQRT_PI * SQRT_HALF * 0.5f;
    return g * (below + x * density);
}
constexpr float GELU_SCALE = 1.41421356237309504880f * TWO_OVER_SQRT_PI * 0.5f, GELU_CUBE = 0.044715f;
OPERATION gelu_tanh(float x) { return 0.5f * x * (1 + tanhf(GELU_SCALE * (x + GELU_CUBE * (x * x * x)))); }
OPERATION gelu_tanh_backward(float g, float x, float) {
    float squared = x * x, inner = GELU_SCALE * (x + GELU_CUBE * (squared * x)), t = tanhf(inner);
    float left = 0.5f * x, right = 1 + t;
    float of_left = 0.5f * right, of_right = left * ((1 - t * t) * (GELU_SCALE * (1 + 3 * GELU_CUBE * squared)));
    return g * (of_left + of_right);
}

// ---- one argument and numbers

OPERATION leaky_relu(float x, float slope) { return x > 0 ? x : x * slope; }
OPERATION leaky_relu_backward(float g, float x, float, float slope) { return x > 0 ? g : g * slope; }
OPERATION exponential_unit(float x, float alpha, float scale, float inner) {
    return x < 0 ? expm1f(x * inner) * (alpha * scale) : x * scale;
}
OPERATION exponential_unit_backward(float g, float x, float alpha, float scale, float inner) {
    return x <= 0 ? g * inner * (alpha * scale) * expf(x * inner) : g * scale;
}
OPERATION elu(float x, float alpha) { return exponential_unit(x, alpha, 1, 1); }
OPERATION elu_backward(float g, float x, float, float alpha) { return exponential_unit_backward(g, x, alpha, 1, 1); }
OPERATION celu(float x, float alpha) { return exponential_unit(x, alpha, 1, 1 / alpha); }
OPERATION celu_backward(float g, float x, float, float alpha) {
    return exponential_unit_backward(g, x, alpha, 1, 1 / alpha);
}
constexpr float SELU_ALPHA = 1.6732632423543772848f, SELU_SCALE = 1.0507009873554804934f;
OPERATION selu(float x) { return exponential_unit(x, SELU_ALPHA, SELU_SCALE, 1); }
OPERATION selu_backward(float g, float x, float) { return exponential_unit_backward(g, x, SELU_ALPHA, SELU_SCALE, 1); }
OPERATION softplus(float x, float beta, float threshold) {
    return x * beta > threshold ? x : log1pf(expf(x * beta)) / beta;
}
OPERATION softplus_backward(float g, float x, float, float beta, float threshold) {
    float z = expf(x * beta);
    return x * beta > threshold ? g : g * z / (z + 1);
}
// A bound that is not there is an infinity: nothing is beyond it, and no gradient stops at it.
OPERATION clamp(float x, float low, float high) { return x != x ? x : x < low ? low : x > high ? high : x; }
OPERATION clamp_backward(float g, float x, float, float low, float high) { return x >= low && x <= high ? g : 0.0f; }

// ---- two arguments, with a gradient for each

OPERATION add(float a, float b) { return a + b; }
OPERATION add_backward_0(float g, float, float, float) { return g; }
OPERATION add_backward_1(float g, float, float, float) { return g; }
OPERATION sub(float a, float b) { return a - b; }
OPERATION sub_backward_0(float g, float, float, float) { return g; }
OPERATION sub_backward_1(float g, float, float, float) { return -g; }
OPERATION mul(float a, float b) { return a * b; }
OPERATION mul_backward_0(float g, float, float b, float) { return g * b; }
OPERATION mul_backward_1(float g, float a, float, float) { return g * a; }
OPERATION div(float a, float b) { return a / b; }
OPERATION div_backward_0(float g, float, float b, float) { return g / b; }
OPERATION div_backward_1(float g, float a, float b, float) { return -g * ((a / b) / b); }
OPERATION pow(float a, float b) { return powf(a, b); }
OPERATION pow_backward_0(float g, float a, float b, float) { return b == 0 ? 0.0f : g * (b * powf(a, b - 1)); }
OPERATION pow_backward_1(float g, float a, float b, float y) { return a == 0 && b >= 0 ? 0.0f : g * (y * logf(a)); }
OPERATION minimum(float a, float b) { return a != a ? a : b != b ? b : a < b ? a : b; }
OPERATION minimum_backward_0(float g, float a, float b, float) { return a > b ? 0.0f : a == b ? g / 2 : g; }
OPERATION minimum_backward_1(float g, float a, float b, float) { return b > a ? 0.0f : a == b ? g / 2 : g; }
OPERATION maximum(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
OPERATION maximum_backward_0(float g, float a, float b, float) { return a < b ? 0.0f : a == b ? g / 2 : g; }
OPERATION maximum_backward_1(float g, float a, float b, float) { return b < a ? 0.0f : a == b ? g / 2 : g; }

#undef OPERATION

}  // namespace elementwise
