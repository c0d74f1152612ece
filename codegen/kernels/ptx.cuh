// Thin names for the PTX that the kernels are made of: barriers, bulk copies, matrix products, register budgets.
//
// Header-free on purpose: NVRTC brings no headers, and a kernel of these alone compiles in a fraction of a second.
#pragma once

using i32 = int;
using i64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct __align__(64) TensorMap {  // CUtensorMap, encoded by the host
    u64 opaque[16];
};

// A value that is the same in all lanes, as one that the compiler knows to be: what follows from it may live in uniform
// registers, where bulk copies and matrix products want their operands.
__device__ __forceinline__ i32 uniform(i32 value) { return __reduce_max_sync(~0u, value); }

namespace ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- clusters

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Writes a word to the same place of another block of the cluster, whose barrier counts the bytes.
__device__ __forceinline__ void store_at(i32* to, u32 value, u64* barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 place, remote;\n"
        "mapa.shared::cluster.u32 place, %0, %3;\n"
        "mapa.shared::cluster.u32 remote, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [place], %1, [remote];\n}" ::"r"(shared_address(to)),
        "r"(value), "r"(shared_address(barrier)), "r"(rank)
        : "memory");
}

// ---- warps

// True in one lane of a warp that has come together.
__device__ __forceinline__ bool elect() {
    u32 chosen;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(chosen));
    return chosen;
}

// ---- barriers in shared memory. MOECOMPILE_DELAYS is for tests: warps come to and leave every barrier late, by chance

#ifdef MOECOMPILE_DELAYS
__device__ __forceinline__ void delay() {
    u32 chance = u32(clock()) * 2654435761u;  // the same in all lanes of a warp
    if (chance >> 29 == 0) __nanosleep(chance >> 18 & 2047);
}
#else
__device__ __forceinline__ void delay() {}
#endif

__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;"); }

__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    delay();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Bytes will come of which nobody who arrives has spoken; the barrier waits for them and for everybody.
__device__ __forceinline__ void barrier_expect_more(u64* barrier, u32 bytes) {
    delay();
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    delay();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives on the same barrier of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u64* barrier, u32 rank) {
    delay();
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    delay();
    asm volatile(
        "{\n.reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void named_barrier(u32 number, u32 threads) {
    delay();
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- launches. A grid may begin while those before it still run (runtime/launch.py): its first steps then cost nothing

// Until all that was launched before is done, and what it wrote can be seen. Before, nothing of it may be read, and nothing
// at all may be written. Loads by __ldg are of what never changes, to the compiler, which moves them as it likes: a test
// looks where they are (tests/test_kernels.py).
__device__ __forceinline__ void wait_for_earlier_grids() {
    delay();
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next grid may begin. Whoever says so has waited himself: so the next may rely, before it waits, on all that was there
// before this one, and reads it past L1, which may hold what was there before that.
__device__ __forceinline__ void let_next_grid_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void take_turn() {
    wait_for_earlier_grids();
    delay();
    let_next_grid_begin();
}

// ---- bulk tensor copies

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_2d(void* to, const TensorMap* map, u64* barrier, i32 x, i32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void load_3d(void* to, const TensorMap* map, u64* barrier, i32 x, i32 y, i32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// Into the same place of every block named in `blocks`, whose own barriers count the bytes.
__device__ __forceinline__ void load_2d_multicast(void* to, const TensorMap* map, u64* barrier, i32 x, i32 y, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void load_3d_multicast(void* to, const TensorMap* map, u64* barrier, i32 x, i32 y, i32 z,
                                                  u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void store_2d(const TensorMap* map, const void* from, i32 x, i32 y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y)
                 : "memory");
}

__device__ __forceinline__ void store_3d(const TensorMap* map, const void* from, i32 x, i32 y, i32 z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Adds a box of floats to what is there.
__device__ __forceinline__ void add_3d(const TensorMap* map, const void* from, i32 x, i32 y, i32 z) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until the source of all but the last PENDING groups of this thread's stores may be overwritten.
template <int PENDING>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until all but the last PENDING groups of this thread's stores are written.
template <int PENDING = 0>
__device__ __forceinline__ void store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for memory of the device.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- bulk copies of bytes: addresses and sizes are multiples of 16

__device__ __forceinline__ void load_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void store_bytes(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                 "r"(bytes)
                 : "memory");
}

// The same of bytes that are read once: L2 gives them up first, and keeps what others have there.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void load_bytes_once(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(read_once())
                 : "memory");
}

// ---- words that ranks tell each other of what they have written

// Until what bulk copies have written, and this thread has waited for, comes before what it writes next.
__device__ __forceinline__ void fence_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ void store_release_system(u64* word, u64 value) {
    delay();
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// Of no order with anything: a fence comes behind it.
__device__ __forceinline__ u64 load_relaxed_system(const u64* word) {
    u64 value;
    delay();
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// ---- words that blocks tell each other of what they have written

__device__ __forceinline__ void add_release(u32* word, u32 value) {
    delay();
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// Of no order with anything: to look whether it is worth while to ask for one.
__device__ __forceinline__ u32 load_relaxed(const u32* word) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ u32 load_acquire(const u32* word) {
    u32 value;
    delay();
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// ---- registers

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- arithmetic

// e to the power of x, to some units in the last place; infinities and zeros as of expf.
__device__ __forceinline__ float fast_exp(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896340736f));
    return result;
}

// 1 / x, to a unit in the last place; 0 for infinities.
__device__ __forceinline__ float fast_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float round_bf16(float x) {
    float rounded;
    asm("{\n.reg .b16 half;\ncvt.rn.bf16.f32 half, %1;\ncvt.f32.bf16 %0, half;\n}" : "=f"(rounded) : "f"(x));
    return rounded;
}

__device__ __forceinline__ float round_f16(float x) {
    float rounded;
    asm("{\n.reg .b16 half;\ncvt.rn.f16.f32 half, %1;\ncvt.f32.f16 %0, half;\n}" : "=f"(rounded) : "f"(x));
    return rounded;
}

// ---- matrices in registers

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 pack_fp16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ void unpack_bf16(u32 packed, float& low, float& high) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
}

__device__ __forceinline__ void unpack_fp16(u32 packed, float& low, float& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(packed));
}

// Two e4m3 numbers, each the nearest; beyond 448 they stay at 448, and NaN stays NaN.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// Four fp16 numbers to four e4m3 numbers, and back.
__device__ __forceinline__ u32 narrow_e4m3(u32 low, u32 high) {
    u32 narrow;
    asm("{\n"
        ".reg .b16 l, h;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 l, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f16x2 h, %2;\n"
        "mov.b32 %0, {l, h};\n"
        "}\n"
        : "=r"(narrow)
        : "r"(low), "r"(high));
    return narrow;
}

__device__ __forceinline__ void widen_e4m3(u32 narrow, u32& low, u32& high) {
    asm("{\n"
        ".reg .b16 l, h;\n"
        "mov.b32 {l, h}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, l;\n"
        "cvt.rn.f16x2.e4m3x2 %1, h;\n"
        "}\n"
        : "=r"(low), "=r"(high)
        : "r"(narrow));
}

__device__ __forceinline__ void unpack_e4m3(u16 narrow, float& low, float& high) {
    u32 packed;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(packed) : "h"(narrow));
    unpack_fp16(packed, low, high);
}

// Two products of fp16 numbers.
__device__ __forceinline__ u32 multiply_fp16(u32 a, u32 b) {
    u32 products;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(products) : "r"(a), "r"(b));
    return products;
}

// The larger of each of two numbers; of a number and NaN, the number.
__device__ __forceinline__ u32 larger_bf16(u32 a, u32 b) {
    u32 larger;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

__device__ __forceinline__ u32 larger_fp16(u32 a, u32 b) {
    u32 larger;
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

// The larger magnitude of each of two numbers, with any sign; of a number and NaN, the number's.
__device__ __forceinline__ u32 farther_fp16(u32 a, u32 b) {
    u32 farther;
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(farther) : "r"(a), "r"(b));
    return farther;
}

// Two bytes of shared memory.
__device__ __forceinline__ u16 load_shared(u32 address) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared(u32 address, u16 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ void load_matrix_x4(u32 address, u32 (&found)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_matrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// The same with rows and columns of each 8 x 8 exchanged.
__device__ __forceinline__ void store_matrix_x4_turned(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

}  // namespace ptx
