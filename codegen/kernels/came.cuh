// Rows that another device may have written: loads go past L1, which does not see that.
#pragma once
#include "result.cuh"

// Eight neighbouring numbers of a row, or one.
template <typename Result>
struct Came;
template <>
struct Came<Float> {
    static __device__ __forceinline__ float one(const u8* row, i32 column) { return __ldcg(reinterpret_cast<const float*>(row) + column); }
    static __device__ __forceinline__ void eight(const u8* row, i32 column, float (&v)[8]) {
        const float4* from = reinterpret_cast<const float4*>(row) + column / 4;
        float4 low = __ldcg(from), high = __ldcg(from + 1);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};
template <typename Input>
struct Came<Half<Input>> {
    static __device__ __forceinline__ float one(const u8* row, i32 column) {
        float low, high;
        Input::unpack(__ldcg(reinterpret_cast<const u16*>(row) + column), low, high);
        return low;
    }
    static __device__ __forceinline__ void eight(const u8* row, i32 column, float (&v)[8]) {
        Half<Input>::unpack(__ldcg(reinterpret_cast<const uint4*>(row) + column / 8), v);
    }
};
