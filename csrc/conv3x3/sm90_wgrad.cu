// wgrad of the 3x3 convolution by wgmma, for sm_90a, fp16 and bf16.
//
//     partial[split][k][t][c] = sum over the split's positions m of  dy[m][k] * x[source pixel of (m, t)][c]
//
// dy (grid positions, K) and x (source pixels, C), formed while they are read (problem.h), C and K multiples of 8, one
// group; partial (splits, K, 9, C) fp32, which wgrad_reduce.cu adds up.
// Work: a program, one on each multiprocessor, has 64 channels c, 64 filters k, nine taps and a split of the positions,
//     64 at a time. One warpgroup brings x and dy and forms them (sm90_wgrad.cuh), three multiply. Each has a row of
//     the 3x3 kernel, 3 taps of 64 c x 64 k: 96 accumulators a thread.
// Products: 64 c x 64 k += 64 c x 16 positions (A) * 16 positions x 64 k (B). B is dy where it stands, k contiguous. A
//     is x, transposed into registers by ldmatrix: each lane gives the address of its position's row, shifted by the
//     tap, or of zeros where the tap is outside the image. A tap's registers are loaded when its last product is done,
//     while those of the two other taps are under way.
// Model (not measured), in cycles of a multiprocessor for a block of 64 positions: products 9 * 4 * 32 = 1152; shared
//     memory at 128 bytes a cycle: the products' A and B, 9 * 4 * 4096 bytes, 1152; copies, 64 for each 8 KB; forming
//     reads and writes, 128, with a partner 192.
//                                           cycles   L2 bytes   instructions of a scheduler
//     x and dy plain                          1280      16 KB         900
//     x activated, dy with a partner          1664      24 KB        1250
//     the same, stride 2 (x has four fills)   2240      48 KB        1900
//     56x56x64, 28x28x128, 14x14x256, 7x7x512 at batch 256, 132 multiprocessors: 131, 33, 8, 2 splits of 96, 96, 98, 98
//     blocks. With x activated and dy with a partner each takes 0.10 ms at 1.7 GHz (580 TFLOP/s; plain 750), reads 3.0,
//     1.5, 0.8, 0.4 TB/s, and writes 19 MB of partial sums.
//     A program of 64 c x 128 k x 3 taps would read 96 instead of 128 bytes a cycle for its products, but bring and
//     form x and dy three times.
// Numerics: fp32 accumulation over a split, in an order that depends on the problem and on the launch alone.

#include <algorithm>

#include "common/launch.h"
#include "conv3x3/launch.h"
#include "conv3x3/sm90_wgrad.cuh"
#include "conv3x3/wgrad_splits.h"

namespace resnet_fused::conv3x3 {

namespace {

using namespace sm90_wgrad;

constexpr int kConsumers = 3;  // warpgroups
constexpr int kThreads = kGroup * (kConsumers + 1);
constexpr int kGroupWarps = kGroup / 32;
constexpr int kProducerRegisters = 104;  // four warpgroups have 512 a thread to share
constexpr int kConsumerRegisters = 136;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 512);

constexpr int kMaxStages = 4;
constexpr int kMinStages = 2;

// --- consumers -------------------------------------------------------------------------------------------------------

constexpr int kStep = 16;  // positions of one wgmma
constexpr int kSteps = kPositions / kStep;
constexpr int kGroupTaps = kTaps / kConsumers;
using Accumulators = float[kGroupTaps][kTile / 8][4];

// Where a lane finds the first row of x of each tap: the ring's shared address, and an offset from there.
struct TapRows {
    std::uint32_t ring[kGroupTaps];
    std::uint32_t offset[kGroupTaps];

    __device__ __forceinline__ TapRows(const Params& p, std::uint32_t shared, int first_weight, int position,
                                       int chunk) {
        const Plan& plan = p.problem.plan;
#pragma unroll
        for (int i = 0; i < kGroupTaps; ++i) {
            int t = 0;
            while (plan.tap[t].weight != first_weight + i) {
                ++t;
            }
            int f = 0;
            while (t >= plan.fill[f].first_tap + plan.fill[f].taps) {
                ++f;
            }
            ring[i] = shared + p.x + static_cast<std::uint32_t>(f) * p.ring;
            offset[i] = swizzled(position + plan.tap[t].shift - plan.fill[f].lo, chunk);
        }
    }
};

// A store instruction writes 8 consecutive channels, a sector of 32 bytes, of 4 filters.
__device__ __forceinline__ void store(const WgradParams& problem, const Share& share, const Accumulators& acc,
                                      int first_weight, int warp, int lane) {
    const int k = share.k + lane % 4 * 2;
    const int c = share.c + 16 * warp + lane / 4;
    const std::int64_t filter = static_cast<std::int64_t>(kTaps) * problem.c;
    float* to = problem.partial + (static_cast<std::int64_t>(share.split) * problem.k + k) * filter +
                first_weight * problem.c + c;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j, to += 8 * filter) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (k + 8 * j + e % 2 >= problem.k || c + e / 2 * 8 >= problem.c) continue;
#pragma unroll
            for (int i = 0; i < kGroupTaps; ++i) {
                to[e % 2 * filter + i * problem.c + e / 2 * 8] = acc[i][j][e];
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void consume(const Params& p, const Share& share, std::uint32_t shared, int kernel_row,
                                        int thread) {
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int first_weight = kernel_row * kGroupTaps;
    // The matrices of ldmatrix: positions 0 to 7 of the warp's channels 0 to 7 and 8 to 15, then positions 8 to 15.
    const int position = lane % 8 + lane / 16 * 8;
    const TapRows rows(p, shared, first_weight, position, 2 * warp + lane / 8 % 2);
    Accumulators acc = {};
    std::uint32_t a[kGroupTaps][4] = {};
    wgmma_fence(acc);
    Turn turn;
    int last = 0;  // stage of the block before
    std::uint32_t x = 0;
    for (int block = 0; block < share.blocks; ++block) {
        barrier_wait(full_barrier(p, shared, turn.stage), turn.parity);
        const std::uint32_t dy = shared + static_cast<std::uint32_t>(turn.stage * kBlockBytes);
        const int first = turn.stage * kPositions + position;
        std::uint32_t mask[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const std::uint32_t at = shared + p.masks + 2 * static_cast<std::uint32_t>(first + step * kStep);
            mask[step] = static_cast<std::uint32_t>(load_shared<std::uint16_t>(at)) >> first_weight;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step, x += kStep * kRowBytes) {
            const std::uint64_t b = matrix_descriptor(dy + step * kStep * kRowBytes, 0, 8 * kRowBytes);
#pragma unroll
            for (int i = 0; i < kGroupTaps; ++i) {
                // Zeros are read from the banks that the row would have been read from.
                const std::uint32_t row = rows.ring[i] + ((rows.offset[i] + x) & (p.ring - 1));
                const std::uint32_t zeros = shared + p.zeros + rows.offset[i] % kRowBytes;
                wgmma_wait<kGroupTaps - 1>(a[i]);
                ldmatrix_x4_trans(a[i], mask[step] >> i & 1 ? row : zeros);
                wgmma_fence(a[i]);
                wgmma<T, kTile, true>(acc[i], a[i], b);
                wgmma_commit();
            }
            if (step == 0 && block > 0) {  // all products of the block before are done
                warp_sync();
                if (lane == 0) barrier_arrive(empty_barrier(p, shared, last));
            }
        }
        last = turn.stage;
        turn.advance(p.stages);
    }
    wgmma_wait<0>(acc);
    store(p.problem, share, acc, first_weight, warp, lane);
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sm90_wgrad_kernel(const __grid_constant__ Params p) {
    const std::uint32_t shared = shared_address(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    const Share share = share_of(p.problem);
    if (thread < kRowChunks) store_shared16(shared + p.zeros + 16 * static_cast<std::uint32_t>(thread), uint4{});
    if (thread == 0) {
        for (int stage = 0; stage < p.stages; ++stage) {
            barrier_init(full_barrier(p, shared, stage), kGroupWarps);
            barrier_init(empty_barrier(p, shared, stage), kConsumers * kGroupWarps);
        }
        barrier_init_fence();
    }
    block_sync();
    if (thread < kConsumers * kGroup) {
        registers_increase<kConsumerRegisters>();
        consume<T>(p, share, shared, thread / kGroup, thread % kGroup);
    } else {
        registers_decrease<kProducerRegisters>();
        Producer<T>(p, share, shared, thread % kGroup).run();
    }
}

using Kernel = void (*)(Params);

Kernel kernel_of(Type type) {
    return type == Type::kFp16 ? sm90_wgrad_kernel<Fp16> : sm90_wgrad_kernel<Bf16>;
}

// --- launch ----------------------------------------------------------------------------------------------------------

// Lays out shared memory; its size.
std::size_t lay_out(Params& p, int stages) {
    const Plan& plan = p.problem.plan;
    const std::int64_t lead = ceil_div(plan.extra, kPositions);
    std::int64_t ring = kBlockBytes;
    while (ring < (lead + stages) * kBlockBytes)
        ring *= 2;
    const std::int64_t partner = static_cast<std::int64_t>(stages) * kBlockBytes;
    const std::int64_t x = p.problem.dy.partner != nullptr ? 2 * partner : partner;
    const std::int64_t zeros = x + plan.fills * ring;
    const std::int64_t masks = zeros + kRowBytes;
    const std::int64_t barriers = masks + stages * kPositions * 2;
    p.stages = stages;
    p.lead = static_cast<int>(lead);
    for (const Tap& tap : plan.tap) {
        p.dilation = std::max(p.dilation, tap.dh);
    }
    p.x_is_grid = plan.fills == 1 && contiguous(plan, plan.fill[0]);
    p.ring = static_cast<std::uint32_t>(ring);
    p.partner = static_cast<std::uint32_t>(partner);
    p.x = static_cast<std::uint32_t>(x);
    p.zeros = static_cast<std::uint32_t>(zeros);
    p.masks = static_cast<std::uint32_t>(masks);
    p.barriers = static_cast<std::uint32_t>(barriers);
    return static_cast<std::size_t>(barriers + 2 * stages * 8);
}

void set_tiles(WgradParams& problem) {
    problem.tiles_k = static_cast<int>(ceil_div(problem.k, kTile));
    problem.tiles_c = static_cast<int>(ceil_div(problem.c, kTile));
    problem.blocks = static_cast<int>(ceil_div(positions(problem.plan), kPositions));
}

}  // namespace

bool plan_sm90_wgrad(const Config& config, Type type, const WgradParams& params, int device, Launch& launch) {
    if (config.chip != Chip::kHopper || config.rows != kPositions || capability(device) != 90) return false;
    if (type != Type::kFp16 && type != Type::kBf16) return false;
    if (params.group_c != params.c || !params.vector_x || !params.vector_dy) return false;
    if (params.x.form == Form::kGradient || params.x.partner != nullptr || positions(params.plan) == 0) return false;
    Params given{};
    given.problem = params;
    int stages = kMaxStages;
    while (stages >= kMinStages && lay_out(given, stages) > shared_limit(device))
        --stages;
    if (stages < kMinStages) return false;
    set_tiles(given.problem);
    set_splits(given.problem, kPositions, multiprocessors(device));
    launch = {};
    launch.config = config;
    launch.blocks = static_cast<unsigned>(given.problem.tiles_k * given.problem.tiles_c * given.problem.splits);
    launch.threads = kThreads;
    launch.shared = lay_out(given, stages);
    launch.stages = stages;
    launch.blocks_per_split = given.problem.blocks_per_split;
    launch.splits = given.problem.splits;
    return true;
}

void run_sm90_wgrad(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream) {
    Params given{};
    given.problem = params;
    set_tiles(given.problem);
    given.problem.blocks_per_split = launch.blocks_per_split;
    given.problem.splits = launch.splits;
    lay_out(given, launch.stages);
    resnet_fused::launch(kernel_of(type), launch.blocks, launch.threads, launch.shared, stream, given);
}

}  // namespace resnet_fused::conv3x3
