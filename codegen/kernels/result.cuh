// What sums in float32 are written as, and read from: one number, eight neighbouring ones, or those of 16 bytes.
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
    static constexpr int NUMBERS = 4;  // of 16 bytes
    static __device__ __forceinline__ void unpack(const uint4& packed, float (&v)[NUMBERS]) {
        v[0] = __uint_as_float(packed.x), v[1] = __uint_as_float(packed.y);
        v[2] = __uint_as_float(packed.z), v[3] = __uint_as_float(packed.w);
    }
    static __device__ __forceinline__ uint4 pack(const float (&v)[NUMBERS]) {
        return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
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
    static __device__ __forceinline__ void store(u16* to, const float (&v)[8]) { *reinterpret_cast<uint4*>(to) = pack(v); }
    static constexpr int NUMBERS = 8;  // of 16 bytes
    static __device__ __forceinline__ void unpack(const uint4& packed, float (&v)[NUMBERS]) {
        Input::unpack(packed.x, v[0], v[1]), Input::unpack(packed.y, v[2], v[3]);
        Input::unpack(packed.z, v[4], v[5]), Input::unpack(packed.w, v[6], v[7]);
    }
    static __device__ __forceinline__ uint4 pack(const float (&v)[NUMBERS]) {
        return make_uint4(Input::pack(v[0], v[1]), Input::pack(v[2], v[3]), Input::pack(v[4], v[5]), Input::pack(v[6], v[7]));
    }
};
