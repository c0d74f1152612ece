// What sums in float32 are written as: one number, or eight neighbouring ones.
#pragma once
#include "wgmma.cuh"

struct Float {
    using Element = float;
    static __device__ __forceinline__ void store(float* to, float v) { *to = v; }
    static __device__ __forceinline__ void round(const float (&sum)[8], float (&v)[8]) {
        for (int i = 0; i < 8; i++) v[i] = sum[i];
    }
    static __device__ __forceinline__ void store(float* to, const float (&v)[8]) {
        reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
};

template <typename Input>
struct Half {
    using Element = u16;
    static __device__ __forceinline__ void store(u16* to, float v) { *to = u16(Input::pack(v, 0)); }
    static __device__ __forceinline__ void round(const float (&sum)[8], float (&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) Input::unpack(Input::pack(sum[i], sum[i + 1]), v[i], v[i + 1]);
    }
    static __device__ __forceinline__ void store(u16* to, const float (&v)[8]) {
        *reinterpret_cast<uint4*>(to) = make_uint4(Input::pack(v[0], v[1]), Input::pack(v[2], v[3]),
                                                   Input::pack(v[4], v[5]), Input::pack(v[6], v[7]));
    }
};
