// The wrappers of common/sm90.h against what the PTX ISA says of them, written down again: on a GPU and in the
// emulator.

#include <tuple>
#include <utility>

#include "common/launch.h"
#include "common/sm90.h"
#include "common/tensor_map.h"
#include "emulator/testing.h"

namespace resnet_fused {

namespace {

using testing::Device;
using testing::expect;
using testing::expect_equal;
using testing::small_integers;

constexpr int kWarp = 32;
constexpr int kRowBytes = 128;  // of a box: 64 elements
constexpr int kRowElements = 64;

template <class T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, Bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// ---- boxes

struct BoxParams {
    CUtensorMap map;
    int rank;
    int rows;  // of the box
    int c0, c1, c2;
    uint4* to;  // the shared memory as it is, 16 bytes at a time
};

// Block 0 fetches two boxes that complete on one barrier; the second one a row of 64 to the right.
__global__ void __launch_bounds__(kWarp) fetch_boxes(const __grid_constant__ BoxParams p) {
    const std::uint32_t boxes = shared_address(shared_memory());
    const std::uint32_t bytes = p.rows * kRowBytes;
    const std::uint32_t barrier = boxes + 2 * bytes;
    if (threadIdx.x == 0) {
        tma_prefetch(&p.map);
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_expect(barrier, bytes);
        for (int i = 0; i < 2; ++i) {
            if (p.rank == 2) {
                tma_load_2d(boxes + i * bytes, &p.map, barrier, p.c0 + i * kRowElements, p.c1);
            } else {
                tma_load_3d(boxes + i * bytes, &p.map, barrier, p.c0 + i * kRowElements, p.c1, p.c2);
            }
        }
        barrier_arrive_expect(barrier, bytes);
    }
    warp_sync();
    barrier_wait(barrier, 0);
    for (std::uint32_t at = threadIdx.x * 16; at < 2 * bytes; at += kWarp * 16) {
        store_global16(p.to + at / 16, load_shared16(boxes + at));
    }
}

// A tensor of 72 x 10 x 5 elements (or of 72 x 10) whose rows have 80 elements of memory and whose planes 12 rows.
void test_boxes(int rank, int c0, int c1, int c2) {
    constexpr std::uint64_t kDims[3] = {72, 10, 5};
    constexpr int kRow = 80;
    constexpr int kPlane = 12 * kRow;
    constexpr std::uint32_t kBox[3] = {kRowElements, 8, 3};
    const std::vector<Bf16> values = small_integers<Bf16>(kDims[2] * kPlane, 11);
    const Device<Bf16> tensor(values);
    BoxParams params{};
    constexpr std::uint64_t kStrides[2] = {kRow * sizeof(Bf16), kPlane * sizeof(Bf16)};
    encode_tiled(&params.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, tensor.data(), kDims, kStrides, kBox, "test");
    params.rank = rank;
    constexpr int kBoxRows = kBox[1];
    params.rows = rank == 2 ? kBoxRows : kBoxRows * static_cast<int>(kBox[2]);
    params.c0 = c0;
    params.c1 = c1;
    params.c2 = rank == 2 ? 0 : c2;
    const Device<Bf16> fetched(static_cast<std::size_t>(2 * params.rows * kRowElements));
    params.to = reinterpret_cast<uint4*>(fetched.data());
    launch(fetch_boxes, 1, kWarp, 2 * params.rows * kRowBytes + 8, nullptr, params);
    std::vector<float> want;
    for (int row = 0; row < 2 * params.rows; ++row) {
        for (int place = 0; place < kRowElements; ++place) {
            // The 16-byte chunk that stands at `place` is the one whose number differs from it by the row's lower bits.
            const int chunk = (place / 8) ^ (row % 8);
            const int c = c0 + row / params.rows * kRowElements + chunk * 8 + place % 8;
            const int i = c1 + row % params.rows % kBoxRows;
            const int j = params.c2 + row % params.rows / kBoxRows;
            const auto within = [](int at, std::uint64_t size) {
                return at >= 0 && static_cast<std::uint64_t>(at) < size;
            };
            const bool inside = within(c, kDims[0]) && within(i, kDims[1]) && within(j, kDims[2]);
            want.push_back(inside ? to_float(values[static_cast<std::size_t>(j * kPlane + i * kRow + c)]) : 0.0f);
        }
    }
    std::vector<float> got;
    for (const Bf16 value : fetched.host()) {
        got.push_back(to_float(value));
    }
    expect_equal(got, want,
                 "tma_load_" + std::to_string(rank) + "d at " + std::to_string(c0) + ", " + std::to_string(c1) + ", " +
                     std::to_string(c2));
}

// ---- products

constexpr int kRows = 64;
constexpr int kStages = 2;
constexpr int kConsumers = 128;                   // one warpgroup
constexpr int kThreads = kConsumers + 4 * kWarp;  // and one whose first thread fetches
constexpr int kABytes = kRows * kRowBytes;

struct ProductParams {
    CUtensorMap a;  // (64, depth) box 64 x 64
    CUtensorMap b;  // (n, depth) box 64 x n, or transposed (depth, n) box 64 x 64
    float* d;       // (64, n)
    int steps;      // of 64 of the depth
};

template <int N, bool kTransposed>
struct Stage {
    static constexpr int kColumnBlocks = (N + kRowElements - 1) / kRowElements;
    static constexpr int kBBytes = (kTransposed ? kColumnBlocks * kRowElements : N) * kRowBytes;
    static constexpr int kBytes = kABytes + kBBytes;
    static constexpr int kShared = kStages * (kBytes + 2 * 8);
};

// D = A * B of one warpgroup: a ring of stages, `full` when fetched and `empty` when every warp has read them. The
// products of a step are under way while the next step's operands are read.
template <class T, int N, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1) multiply(const __grid_constant__ ProductParams p) {
    using Ring = Stage<N, kTransposed>;
    const std::uint32_t ring = shared_address(shared_memory());
    const std::uint32_t full = ring + kStages * Ring::kBytes;
    const std::uint32_t empty = full + kStages * 8;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, kConsumers / kWarp);
        }
        barrier_init_fence();
    }
    block_sync();
    if (warp >= kConsumers / kWarp) {
        registers_decrease<24>();
        if (threadIdx.x != kConsumers) return;
        for (int step = 0; step < p.steps; ++step) {
            const int stage = step % kStages;
            const std::uint32_t a = ring + stage * Ring::kBytes;
            const int k = step * kRowElements;
            barrier_wait(empty + stage * 8, step / kStages % 2 ^ 1);
            barrier_arrive_expect(full + stage * 8, Ring::kBytes);
            tma_load_2d(a, &p.a, full + stage * 8, k, 0);
            if constexpr (kTransposed) {
                for (int i = 0; i < Ring::kColumnBlocks; ++i) {
                    tma_load_2d(a + kABytes + i * kRowElements * kRowBytes, &p.b, full + stage * 8, i * kRowElements,
                                k);
                }
            } else {
                tma_load_2d(a + kABytes, &p.b, full + stage * 8, k, 0);
            }
        }
        return;
    }
    registers_increase<240>();
    float d[N / 8][4] = {};
    std::uint32_t a[2][4][4];
    const int row = warp * 16 + lane % 16;
#pragma unroll 2
    for (int step = 0; step < p.steps; ++step) {
        const std::uint32_t stage = ring + step % kStages * Ring::kBytes;
        barrier_wait(full + step % kStages * 8, step / kStages % 2);
        auto& fragments = a[step % 2];
        for (int k = 0; k < 4; ++k) {
            ldmatrix_x4(fragments[k], stage + row * kRowBytes + ((2 * k + lane / 16) ^ (row % 8)) * 16);
        }
        wgmma_fence(d, fragments);
        const std::uint64_t b = matrix_descriptor(stage + kABytes, kRowElements * kRowBytes, 8 * kRowBytes);
        constexpr std::uint64_t kNext16 = kTransposed ? 16 * kRowBytes : 32;
        for (int k = 0; k < 4; ++k) {
            wgmma<T, N, kTransposed>(d, fragments[k], b + (k * kNext16 >> 4));
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && lane == 0) barrier_arrive(empty + (step - 1) % kStages * 8);
    }
    wgmma_wait<0>(d);
    for (int i = 0; i < N / 8; ++i) {
        for (int j = 0; j < 4; ++j) {
            const int column = i * 8 + lane % 4 * 2 + j % 2;
            p.d[(warp * 16 + lane / 4 + j / 2 * 8) * N + column] = d[i][j];
        }
    }
}

// A has 60 rows and a depth of 200: the rest of the boxes is outside.
template <class T, int N, bool kTransposed>
void test_product() {
    constexpr int kTensorRows = 60;
    constexpr int kDepth = 200;
    const std::vector<T> a = small_integers<T>(kTensorRows * kDepth, 21);
    const std::vector<T> b = small_integers<T>(N * kDepth, 22);  // (n, depth) or (depth, n)
    const Device<T> device_a(a);
    const Device<T> device_b(b);
    const Device<float> d(kRows * N);
    ProductParams params{};
    const auto encode = [](CUtensorMap* map, const Device<T>& tensor, std::uint64_t inner, std::uint64_t outer,
                           std::uint32_t box_rows) {
        const std::uint64_t dims[2] = {inner, outer};
        const std::uint64_t strides[1] = {inner * sizeof(T)};
        const std::uint32_t box[2] = {kRowElements, box_rows};
        encode_tiled(map, kMapType<T>, 2, tensor.data(), dims, strides, box, "test");
    };
    encode(&params.a, device_a, kDepth, kTensorRows, kRows);
    if constexpr (kTransposed) {
        encode(&params.b, device_b, N, kDepth, kRowElements);
    } else {
        encode(&params.b, device_b, kDepth, N, N);
    }
    params.d = d.data();
    params.steps = (kDepth + kRowElements - 1) / kRowElements;
    launch(multiply<T, N, kTransposed>, 1, kThreads, Stage<N, kTransposed>::kShared, nullptr, params);
    std::vector<float> want(kRows * N, 0.0f);
    for (int row = 0; row < kTensorRows; ++row) {
        for (int column = 0; column < N; ++column) {
            double sum = 0;
            for (int k = 0; k < kDepth; ++k) {
                const T other = kTransposed ? b[k * N + column] : b[column * kDepth + k];
                sum += static_cast<double>(to_float(a[row * kDepth + k])) * to_float(other);
            }
            want[row * N + column] = static_cast<float>(sum);
        }
    }
    expect_equal(d.host(), want,
                 "wgmma of n = " + std::to_string(N) + (kTransposed ? ", transposed" : "") +
                     (std::is_same_v<T, Bf16> ? ", bf16" : ", fp16"));
}

template <int... N>
void test_products(std::integer_sequence<int, N...>) {
    (test_product<Bf16, N, false>(), ...);
    (test_product<Bf16, N, true>(), ...);
    (test_product<Fp16, N, false>(), ...);
    (test_product<Fp16, N, true>(), ...);
}

// ---- other barriers

// Warp 0 copies 16 bytes a lane with cp.async, round after round, and warp 1 sums what it finds; every lane arrives.
__global__ void __launch_bounds__(2 * kWarp) hand_over(const uint4* from, std::uint32_t* sums, int rounds) {
    const std::uint32_t slots = shared_address(shared_memory());
    const std::uint32_t full = slots + kWarp * 16;
    const std::uint32_t empty = full + 8;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (threadIdx.x == 0) {
        barrier_init(full, kWarp);
        barrier_init(empty, kWarp);
        barrier_init_fence();
    }
    block_sync();
    std::uint32_t sum = 0;
    for (int round = 0; round < rounds; ++round) {
        if (static_cast<int>(threadIdx.x) < kWarp) {
            barrier_wait(empty, round % 2 ^ 1);
            cp_async16(slots + lane * 16, from + round * kWarp + lane, true);
            cp_async_arrive(full);
        } else {
            barrier_wait(full, round % 2);
            sum = sum * 31 + load_shared16(slots + (kWarp - 1 - lane) * 16).x;
            barrier_arrive(empty);
        }
    }
    if (static_cast<int>(threadIdx.x) >= kWarp) sums[lane] = sum;
}

void test_hand_over() {
    constexpr int kRounds = 7;
    std::vector<std::uint32_t> values(kRounds * kWarp * 4);
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<std::uint32_t>(i * 40503u);
    }
    const Device<std::uint32_t> from(values);
    const Device<std::uint32_t> sums(kWarp);
    launch(hand_over, 1, 2 * kWarp, kWarp * 16 + 16, nullptr, reinterpret_cast<const uint4*>(from.data()), sums.data(),
           kRounds);
    std::vector<std::uint32_t> want(kWarp, 0);
    for (int round = 0; round < kRounds; ++round) {
        for (int lane = 0; lane < kWarp; ++lane) {
            want[lane] = want[lane] * 31 + values[(round * kWarp + kWarp - 1 - lane) * 4];
        }
    }
    expect_equal(sums.host(), want, "cp_async_arrive");
}

// Pairs of warps exchange values at a barrier of their own, each pair a different number of times.
__global__ void __launch_bounds__(4 * kWarp) exchange(std::uint32_t* to) {
    const std::uint32_t slots = shared_address(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    const int pair = thread / (2 * kWarp);
    std::uint32_t value = threadIdx.x;
    for (int round = 0; round < 3 + 2 * pair; ++round) {
        store_shared(slots + thread * 4, value);
        named_barrier_sync(1 + pair, 2 * kWarp);
        value = value * 3 + load_shared<std::uint32_t>(slots + (thread ^ kWarp) * 4);
        named_barrier_sync(1 + pair, 2 * kWarp);
    }
    // What the other warpgroup part reads through the tensor cores or the copy engine needs the fence; here it is free.
    proxy_fence();
    to[thread] = value;
}

void test_exchange() {
    const Device<std::uint32_t> to(4 * kWarp);
    launch(exchange, 1, 4 * kWarp, 4 * kWarp * 4, nullptr, to.data());
    std::vector<std::uint32_t> want(4 * kWarp);
    for (std::uint32_t thread = 0; thread < want.size(); ++thread) {
        std::uint32_t own = thread;
        std::uint32_t other = thread ^ kWarp;
        for (std::uint32_t round = 0; round < 3 + 2 * (thread / (2 * kWarp)); ++round) {
            std::tie(own, other) = std::pair(own * 3 + other, other * 3 + own);
        }
        want[thread] = own;
    }
    expect_equal(to.host(), want, "named_barrier_sync");
}

// ---- tensor maps

void test_declined_maps() {
    const Device<Bf16> tensor(1024);
    const auto declined = [&tensor](std::uint64_t offset, std::uint64_t stride, std::uint32_t rows) {
        CUtensorMap map;
        const std::uint64_t dims[2] = {64, 8};
        const std::uint32_t box[2] = {64, rows};
        try {
            encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, tensor.data() + offset, dims, &stride, box, "op");
        } catch (const std::runtime_error& error) {
            return std::string(error.what()).find("op: cuTensorMapEncodeTiled: error 1 for base") == 0;
        }
        return false;
    };
    expect(!declined(0, 128, 8), "encode_tiled: a map that is right");
    expect(declined(1, 128, 8), "encode_tiled: a base that is not a multiple of 16");
    expect(declined(0, 136, 8), "encode_tiled: a stride that is not a multiple of 16");
    expect(declined(0, 128, 257), "encode_tiled: a box of more than 256 rows");
}

}  // namespace

}  // namespace resnet_fused

int main() {
    using namespace resnet_fused;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 || capability(0) != 90) return 77;
    testing::in_every_order(3, [] {
        for (const int c0 : {-8, 0, 24}) {
            for (const int c1 : {-3, 0, 5}) {
                test_boxes(2, c0, c1, 0);
                for (const int c2 : {-1, 1, 4}) {
                    test_boxes(3, c0, c1, c2);
                }
            }
        }
        test_products(std::integer_sequence<int, 64, 96, 128, 192, 256>());
        test_hand_over();
        test_exchange();
    });
    test_declined_maps();
    return testing::report("sm90");
}
