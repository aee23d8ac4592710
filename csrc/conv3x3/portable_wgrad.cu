// wgrad of the 3x3 convolution by mma.sync, for sm_80 and later.
//
//     partial[split][k][t][c] = sum over the split's positions m of  dy[m][k] * x[source pixel of (m, t)][c]
//
// dy (grid positions, K) and x (source pixels, C), formed while they are read (problem.h); partial (splits, K, 9,
// C / groups) fp32, which wgrad_reduce.cu adds up.
// Work: a block has 64 filters k, 64 channels c (fp32: 32 and 32), all nine taps, and a split of the positions, `rows`
//     at a time. Its channels are among those that its filters' groups reach; products of other groups are not stored.
// Shared memory has a ring of x rows for each fill of the plan: positions follow each other, so a row is copied and
//     formed once, and serves the fill's taps (kHalo at stride 1: all nine). dy has `stages` blocks of rows. A row is
//     128 bytes, one position. The product sums over positions, so ldmatrix transposes both operands; each lane gives
//     the address of its position's row, or, where the tap is outside the image, that of a row of zeros.
// Order: while block b is multiplied, block b + stages - 1 is copied and block b + 1 formed, with one barrier for each
//     block. Of a scheduler's three warps each forms at another moment, and the others multiply.
// Bytes of tensors: x and dy once for each block of K and of C, from the second-level cache but once; plan.extra rows
//     of x more for each split; 9 * 64 * 64 * 4 (fp32: 9 * 32 * 32 * 4) written by each block. Of shared memory, for 64
//     positions: 16 KB copied and formed, 168 KB read for 1152 mma (fp32: 96 KB for 576 products).
// Numerics: fp32 accumulation over a split; fp32 operands as three TF32 products of their high and low parts, or as
//     one. The order of all sums depends on the problem and on the launch alone.

#include <algorithm>

#include "common/launch.h"
#include "conv3x3/launch.h"
#include "conv3x3/portable_wgrad_products.cuh"
#include "conv3x3/wgrad_splits.h"

namespace resnet_fused::conv3x3 {

namespace portable_wgrad {

template <Type kType>
__global__ void __launch_bounds__(kThreads, 1) wgrad_kernel(const __grid_constant__ Params p) {
    using T = Element<kType>;
    using Acc = Accumulators<kType>;
    const Share share = share_of<T>(p);
    if (share.blocks < 0) return;
    const std::uint32_t shared = shared_address(shared_memory());
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int quarter = warp % kQuarters;
    const int third = warp / kQuarters;  // of the taps
    if (warp == 0 && lane < kRowChunks) store_shared16(shared + p.zeros + 16 * lane, uint4{0, 0, 0, 0});
    if (threadIdx.x == 0) keep_share(share, shared + p.share);
    const Feeder<T> feeder(p, share, shared, warp, lane);
    const TapRows taps(p, shared, third, Acc::kWide ? lane % 4 * 2 : lane % 16);
    Acc acc = {};
    const int rows = p.rows / Acc::kShares;
    int stage = 0;  // of `block`; a block below 0 has nothing in its stage
    for (int block = 1 - p.stages; block < share.blocks; ++block) {
        const int before = (stage == 0 ? p.stages : stage) - 1;
        const int after = stage == p.stages - 1 ? 0 : stage + 1;
        block_sync();  // `block` is formed, and the one before is multiplied (at first: the share is kept)
        feeder.copy(block + p.stages - 1, before);
        warp_sync();  // products are made by whole warps: lanes that had less to do wait
        int row = stage * p.rows + (Acc::kWide ? quarter * rows : 0);
        const int to_position = (block - stage) * p.rows;
        const int end = block < 0 ? row : row + rows;
        const int form_row = row + third * ((end - row) / Acc::kStep) / 2 * Acc::kStep;
        for (;; row += Acc::kStep) {
            if (row == form_row) {
                feeder.form(block + 1, after);
                warp_sync();
            }
            if (row == end) break;
            if constexpr (Acc::kWide) {
                multiply_wide(acc, taps, row, row + to_position, lane);
            } else {
                multiply_narrow(acc, taps, row, row + to_position, quarter, lane);
            }
        }
        stage = after;
    }
    if constexpr (Acc::kWide) {
        add_quarters(acc, shared, static_cast<int>(threadIdx.x));
        if (threadIdx.x / 32 % kQuarters != 0) return;
    }
    store(p, kept_share(shared + p.share), acc, static_cast<int>(threadIdx.x));
}

// --- launch ----------------------------------------------------------------------------------------------------------

namespace {

constexpr int kMaxStages = 4;
constexpr int kMinStages = 2;

// What the host needs to know of a type's kernel.
struct KernelOf {
    void (*kernel)(Params);
    int tile;  // filters, and channels, of a block
    int chunk;
    int stored;  // channels that are stored at a time
    int constants_bytes;
    std::size_t quarter_bytes;
};

template <Type kType>
KernelOf kernel_of() {
    using T = Element<kType>;
    return {wgrad_kernel<kType>,    kBlock<T>,          kChunk<T>,
            kStoredChannels<kType>, kConstantsBytes<T>, kQuarterBytes<kType>};
}

KernelOf kernel_of(Type type) {
    switch (type) {
        case Type::kFp16:
            return kernel_of<Type::kFp16>();
        case Type::kBf16:
            return kernel_of<Type::kBf16>();
        case Type::kFp32:
            return kernel_of<Type::kFp32>();
        default:
            return kernel_of<Type::kTf32>();
    }
}

// Lays out shared memory; its size.
std::size_t lay_out(Params& p, const KernelOf& of, int rows, int stages) {
    const Plan& plan = p.problem.plan;
    const std::int64_t held = static_cast<std::int64_t>(rows) * stages + plan.extra;
    std::int64_t slots = 1;
    while (slots < held)
        slots *= 2;
    const std::int64_t dy_bytes = static_cast<std::int64_t>(stages) * rows * kRowBytes;
    const std::int64_t x = p.problem.dy.partner != nullptr ? 2 * dy_bytes : dy_bytes;
    const std::int64_t zeros = x + plan.fills * slots * kRowBytes;
    const std::int64_t share = zeros + kRowBytes;
    const std::int64_t constants = share + 16;
    const std::int64_t masks = constants + 2 * of.constants_bytes;
    const std::int64_t bytes = masks + static_cast<std::int64_t>(kThirds) * stages * rows * kMaskBytes;
    p.rows = rows;
    p.stages = stages;
    p.slot_mask = static_cast<int>(slots - 1);
    // A thread brings about as many rows as another: x has as many as dy for each fill.
    p.x_threads = kThreads * plan.fills / (plan.fills + 1) / 32 * 32;
    p.partner = static_cast<std::uint32_t>(dy_bytes);
    p.x = static_cast<std::uint32_t>(x);
    p.zeros = static_cast<std::uint32_t>(zeros);
    p.share = static_cast<std::uint32_t>(share);
    p.constants = static_cast<std::uint32_t>(constants);
    p.masks = static_cast<std::uint32_t>(masks);
    return std::max(static_cast<std::size_t>(bytes), of.quarter_bytes);
}

void set_tiles(WgradParams& problem, const KernelOf& of, int rows) {
    problem.tiles_k = static_cast<int>(ceil_div(problem.k, of.tile));
    problem.tiles_c = 0;
    for (int k = 0; k < problem.k; k += of.tile) {
        const Channels reached =
            source_channels(k, std::min(k + of.tile, problem.k), problem.group_k, problem.group_c, of.chunk);
        problem.tiles_c = std::max(problem.tiles_c, static_cast<int>(ceil_div(reached.end - reached.begin, of.tile)));
    }
    problem.blocks = static_cast<int>(ceil_div(positions(problem.plan), rows));
}

}  // namespace

}  // namespace portable_wgrad

using namespace portable_wgrad;

bool plan_portable_wgrad(const Config& config, Type type, const WgradParams& params, int device, Launch& launch) {
    if (config.chip != Chip::kPortable || (config.rows != 64 && config.rows != 32)) return false;
    if (params.x.form == Form::kGradient || params.x.partner != nullptr || params.x.mask.sign != Sign::kNone)
        return false;
    if (params.dy.form == Form::kActivated) return false;
    const KernelOf of = kernel_of(type);
    Params given{};
    given.problem = params;
    WgradParams& problem = given.problem;
    int stages = kMaxStages;
    while (stages >= kMinStages && lay_out(given, of, config.rows, stages) > shared_limit(device))
        --stages;
    if (stages < kMinStages) return false;
    set_tiles(problem, of, config.rows);
    set_splits(problem, config.rows, multiprocessors(device));
    launch = {};
    launch.config = config;
    launch.blocks = static_cast<unsigned>(problem.tiles_k * problem.tiles_c * problem.splits);
    launch.threads = kThreads;
    launch.shared = lay_out(given, of, config.rows, stages);
    launch.stages = stages;
    launch.blocks_per_split = problem.blocks_per_split;
    launch.splits = problem.splits;
    return true;
}

void run_portable_wgrad(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream) {
    const KernelOf of = kernel_of(type);
    Params given{};
    given.problem = params;
    set_tiles(given.problem, of, launch.config.rows);
    given.problem.blocks_per_split = launch.blocks_per_split;
    given.problem.splits = launch.splits;
    lay_out(given, of, launch.config.rows, launch.stages);
    given.vector_partial =
        params.group_c % of.stored == 0 && reinterpret_cast<std::uintptr_t>(params.partial) % 16 == 0;
    resnet_fused::launch(of.kernel, launch.blocks, launch.threads, launch.shared, stream, given);
}

}  // namespace resnet_fused::conv3x3
