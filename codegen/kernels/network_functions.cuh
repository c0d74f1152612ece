// What kernels call of NVSHMEM, compiled by itself and linked with them (moecompile/codegen/network.py): its headers take seconds.
//
// Addresses are those of this rank's own memory, which lies at the same place of every rank's heap; `pe` is the other's number.
#pragma once
#include <non_abi/nvshmem_version.h>
#if NVSHMEM_VENDOR_MAJOR_VERSION * 100 + NVSHMEM_VENDOR_MINOR_VERSION < 308
// Its headers are for nvcc, which brings a standard library along.
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#include <cuda/std/type_traits>
#include <cuda/std/utility>
namespace std {
using cuda::std::is_integral;
using cuda::std::is_same;
using cuda::std::is_signed;
using cuda::std::is_unsigned;
using cuda::std::numeric_limits;
}  // namespace std
#endif
#include <nvshmem.h>
#include <nvshmemx.h>

// By a warp: begins to write `bytes` there. Nobody may overwrite them here before `moecompile_network_quiet`.
extern "C" __device__ void moecompile_network_put(void* to, const void* from, unsigned long long bytes, int pe) {
    nvshmemx_putmem_nbi_warp(to, from, bytes, pe);
}
// By a thread: what this warp has put comes before what it signals from here on.
extern "C" __device__ void moecompile_network_fence() { nvshmem_fence(); }
extern "C" __device__ void moecompile_network_signal(unsigned long long* to, unsigned long long value, int pe) {
    nvshmemx_signal_op(reinterpret_cast<uint64_t*>(to), value, NVSHMEM_SIGNAL_SET, pe);
}
// By a thread: until all of it is there.
extern "C" __device__ void moecompile_network_quiet() { nvshmem_quiet(); }
