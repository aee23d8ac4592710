// The wrappers of common/mma.h against what the PTX ISA says of them, written down again: on a GPU and in the emulator.

#include <array>
#include <cmath>

#include "common/launch.h"
#include "common/mma.h"
#include "emulator/testing.h"

namespace resnet_fused {

namespace {

using testing::Device;
using testing::expect;
using testing::expect_equal;
using testing::small_integers;

constexpr int kWarp = 32;
constexpr std::size_t kSharedBytes = 64 * 1024;  // more than a kernel has unasked

// ---- kernels

// ldmatrix of 8x8 matrices that stand one after the other, rows of 16 bytes; each lane's words.
__global__ void __launch_bounds__(kWarp)
    load_matrices(const std::uint16_t* from, std::uint32_t* plain, std::uint32_t* transposed) {
    const std::uint32_t row = shared_address(shared_memory()) + threadIdx.x * 16;
    store_shared16(row, load_global16(from + threadIdx.x * 8));
    warp_sync();
    std::uint32_t r[4];
    ldmatrix_x4(r, row);
    for (int i = 0; i < 4; ++i) {
        plain[threadIdx.x * 4 + i] = r[i];
    }
    ldmatrix_x4_trans(r, row);
    for (int i = 0; i < 4; ++i) {
        transposed[threadIdx.x * 4 + i] = r[i];
    }
}

// One mma of fragments as they stand in memory, lane by lane.
template <class T>
__global__ void __launch_bounds__(kWarp) multiply(const std::uint32_t* a, const std::uint32_t* b, float* d) {
    const std::uint32_t lane = threadIdx.x;
    const std::uint32_t words[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    float sums[4] = {d[lane * 4], d[lane * 4 + 1], d[lane * 4 + 2], d[lane * 4 + 3]};
    if constexpr (std::is_same_v<T, float>) {
        mma_1688_tf32(sums, words, b[lane * 2], b[lane * 2 + 1]);
    } else {
        mma_16816<T>(sums, words, b[lane * 2], b[lane * 2 + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        d[lane * 4 + i] = sums[i];
    }
}

constexpr int kSteps = 5;
constexpr int kStages = 3;
constexpr int kThreads = 128;

// A ring of stages, filled by cp.async two steps ahead; a thread copies 16 bytes of a step, and reads those of the next
// warp. Odd threads of odd steps copy zeros.
__global__ void __launch_bounds__(kThreads) copy_ahead(const unsigned char* from, uint4* to) {
    const std::uint32_t ring = shared_address(shared_memory()) + 1024;
    constexpr int kStageBytes = kThreads * 16;
    const auto fill = [&](int step) {
        if (step < kSteps) {
            const bool valid = step % 2 == 0 || threadIdx.x % 2 == 0;
            cp_async16(ring + step % kStages * kStageBytes + threadIdx.x * 16,
                       valid ? from + step * kStageBytes + threadIdx.x * 16 : from, valid);
        }
        cp_async_commit();
    };
    fill(0);
    fill(1);
    for (int step = 0; step < kSteps; ++step) {
        cp_async_wait<1>();
        block_sync();
        fill(step + 2);
        const std::uint32_t other = (threadIdx.x + kWarp) % kThreads;
        store_global16(to + step * kThreads + threadIdx.x,
                       load_shared16(ring + step % kStages * kStageBytes + other * 16));
    }
}

struct Odds {
    const float* from;
    float* floats;         // [5][kWarp]
    std::uint32_t* words;  // [3][kWarp]
    int* arrived;
    int* last;
};

__global__ void __launch_bounds__(kWarp) odds_and_ends(const __grid_constant__ Odds p) {
    const int lane = static_cast<int>(threadIdx.x);
    const float value = p.from[lane];
    const std::uint32_t shared = shared_address(shared_memory() + 512);
    p.floats[lane] = shuffle_xor(value, 5);
    p.floats[kWarp + lane] = shuffle(value, (lane * 7 + 3) % kWarp);
    p.words[lane] = shuffle_xor(static_cast<std::uint32_t>(lane) << 20, 16);
    store_shared_float(shared + lane * 4, value);
    warp_sync();
    p.floats[2 * kWarp + lane] = load_shared_float(shared + (kWarp - 1 - lane) * 4);
    warp_sync();
    store_shared<Bf16>(shared + lane * 2, from_float<Bf16>(value));
    warp_sync();
    p.floats[3 * kWarp + lane] = to_float(load_shared<Bf16>(shared + (lane ^ 1) * 2));
    p.words[kWarp + lane] = to_tf32(value);
    p.words[2 * kWarp + lane] = shared_address(shared_memory() + lane) - shared_address(shared_memory());
    p.floats[4 * kWarp + lane] = static_cast<float>(max(min(lane, 20), 10u));
    thread_fence();
    if (lane == 0 && atomic_add(p.arrived, 1) == static_cast<int>(gridDim.x) - 1) *p.last += 1;
}

// ---- tests

void test_ldmatrix() {
    std::vector<std::uint16_t> elements(4 * 8 * 8);
    for (std::size_t i = 0; i < elements.size(); ++i) {
        elements[i] = static_cast<std::uint16_t>(i * 251 + 7);
    }
    const Device<std::uint16_t> from(elements);
    const Device<std::uint32_t> plain(kWarp * 4);
    const Device<std::uint32_t> transposed(kWarp * 4);
    launch(load_matrices, 1, kWarp, kSharedBytes, nullptr, from.data(), plain.data(), transposed.data());
    std::vector<std::uint32_t> want(kWarp * 4);
    std::vector<std::uint32_t> want_transposed(kWarp * 4);
    for (std::size_t lane = 0; lane < kWarp; ++lane) {
        for (std::size_t i = 0; i < 4; ++i) {
            const auto at = [&](std::size_t row, std::size_t column) -> std::uint32_t {
                return elements[i * 64 + row * 8 + column];
            };
            const std::size_t row = lane / 4;
            const std::size_t column = lane % 4 * 2;
            want[lane * 4 + i] = at(row, column) | at(row, column + 1) << 16;
            want_transposed[lane * 4 + i] = at(column, row) | at(column + 1, row) << 16;
        }
    }
    expect_equal(plain.host(), want, "ldmatrix_x4");
    expect_equal(transposed.host(), want_transposed, "ldmatrix_x4_trans");
}

// Elements of fragments as the PTX ISA lists them: those of lane l in order, each with row and column.
struct Place {
    int row;
    int column;
};

template <class T>
Place place_a(int lane, int i) {
    const int g = lane >> 2;
    const int t = lane & 3;
    if constexpr (std::is_same_v<T, float>) return {i == 0 || i == 2 ? g : g + 8, i < 2 ? t : t + 4};
    return {(0 <= i && i < 2) || (4 <= i && i < 6) ? g : g + 8, t * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}

template <class T>
Place place_b(int lane, int i) {
    const int g = lane >> 2;
    const int t = lane & 3;
    if constexpr (std::is_same_v<T, float>) return {i == 0 ? t : t + 4, g};
    return {t * 2 + (i & 1) + (i < 2 ? 0 : 8), g};
}

Place place_d(int lane, int i) {
    return {i < 2 ? lane >> 2 : (lane >> 2) + 8, (lane & 3) * 2 + (i & 1)};
}

template <class T>
void test_mma(const char* name) {
    constexpr int kDepth = std::is_same_v<T, float> ? 8 : 16;
    constexpr int kWordElements = 4 / sizeof(T);
    const std::vector<T> a = small_integers<T>(16 * kDepth, 1);
    const std::vector<T> b = small_integers<T>(kDepth * 8, 2);
    const std::vector<float> c = small_integers<float>(16 * 8, 3);
    std::vector<T> fragments_a(kWarp * 4 * kWordElements);
    std::vector<T> fragments_b(kWarp * 2 * kWordElements);
    std::vector<float> fragments_d(kWarp * 4);
    std::vector<float> want(kWarp * 4);
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4 * kWordElements; ++i) {
            const Place at = place_a<T>(lane, i);
            fragments_a[lane * 4 * kWordElements + i] = a[at.row * kDepth + at.column];
        }
        for (int i = 0; i < 2 * kWordElements; ++i) {
            const Place at = place_b<T>(lane, i);
            fragments_b[lane * 2 * kWordElements + i] = b[at.row * 8 + at.column];
        }
        for (int i = 0; i < 4; ++i) {
            const Place at = place_d(lane, i);
            double sum = c[at.row * 8 + at.column];
            for (int k = 0; k < kDepth; ++k) {
                sum += static_cast<double>(to_float(a[at.row * kDepth + k])) * to_float(b[k * 8 + at.column]);
            }
            fragments_d[lane * 4 + i] = c[at.row * 8 + at.column];
            want[lane * 4 + i] = static_cast<float>(sum);
        }
    }
    const Device<T> words_a(fragments_a);
    const Device<T> words_b(fragments_b);
    const Device<float> d(fragments_d);
    launch(multiply<T>, 1, kWarp, 0, nullptr, reinterpret_cast<const std::uint32_t*>(words_a.data()),
           reinterpret_cast<const std::uint32_t*>(words_b.data()), d.data());
    expect_equal(d.host(), want, name);
}

// The chip drops the lower 13 bits of an operand: 1 + 2^-10 - 2^-23 counts as 1.
void test_tf32_operands() {
    std::vector<float> a(kWarp * 4, 0.0f);
    std::vector<float> b(kWarp * 2, 0.0f);
    a[0] = 1.0f + 0x1p-10f - 0x1p-23f;  // row 0, column 0
    b[0] = 3.0f + 0x1p-9f;              // row 0, column 0: all bits stay
    const Device<float> words_a(a);
    const Device<float> words_b(b);
    const Device<float> d(std::vector<float>(kWarp * 4, 0.0f));
    launch(multiply<float>, 1, kWarp, 0, nullptr, reinterpret_cast<const std::uint32_t*>(words_a.data()),
           reinterpret_cast<const std::uint32_t*>(words_b.data()), d.data());
    expect(d.host()[0] == b[0], "mma_1688_tf32: an operand's lower bits");
}

void test_copies() {
    std::vector<std::uint32_t> values(kSteps * kThreads * 4);
    for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<std::uint32_t>(i * 2654435761u);
    }
    const Device<std::uint32_t> from(values);
    const Device<std::uint32_t> to(values.size());
    launch(copy_ahead, 1, kThreads, kSharedBytes, nullptr, reinterpret_cast<const unsigned char*>(from.data()),
           reinterpret_cast<uint4*>(to.data()));
    std::vector<std::uint32_t> want(values.size(), 0);
    for (int step = 0; step < kSteps; ++step) {
        for (int thread = 0; thread < kThreads; ++thread) {
            const int source = (thread + kWarp) % kThreads;
            for (int i = 0; i < 4 && (step % 2 == 0 || source % 2 == 0); ++i) {
                want[(step * kThreads + thread) * 4 + i] = values[(step * kThreads + source) * 4 + i];
            }
        }
    }
    expect_equal(to.host(), want, "cp_async16");
}

// The tf32 nearest to a float, ties away from zero.
float nearest_tf32(float value) {
    if (value == 0 || std::isnan(value) || std::isinf(value)) return value;
    int exponent = 0;
    const double mantissa = std::frexp(static_cast<double>(value), &exponent);  // in [0.5, 1)
    return static_cast<float>(std::ldexp(std::round(mantissa * 2048), exponent - 11));
}

void test_odds_and_ends() {
    constexpr unsigned kBlocks = 5;
    std::vector<float> values(kWarp);
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0.0f, 100.0f);
    for (float& value : values) {
        value = normal(random);
    }
    values[0] = -0.0f;
    values[1] = std::numeric_limits<float>::infinity();
    values[2] = 1.0f + 0x1p-11f;     // a tie
    values[3] = -(1.0f + 0x1p-11f);  // and away from zero is down
    values[4] = 1.0f + 0x1p-11f - 0x1p-23f;
    const Device<float> from(values);
    const Device<float> floats(5 * kWarp);
    const Device<std::uint32_t> words(3 * kWarp);
    const Device<int> arrived(std::vector<int>{0});
    const Device<int> last(std::vector<int>{0});
    launch(odds_and_ends, kBlocks, kWarp, kSharedBytes, nullptr,
           Odds{from.data(), floats.data(), words.data(), arrived.data(), last.data()});
    std::vector<float> want(5 * kWarp);
    std::vector<std::uint32_t> want_words(3 * kWarp);
    for (int lane = 0; lane < kWarp; ++lane) {
        want[lane] = values[lane ^ 5];
        want[kWarp + lane] = values[(lane * 7 + 3) % kWarp];
        want[2 * kWarp + lane] = values[kWarp - 1 - lane];
        want[3 * kWarp + lane] = to_float(from_float<Bf16>(values[lane ^ 1]));
        want[4 * kWarp + lane] = static_cast<float>(std::max(std::min(lane, 20), 10));
        want_words[lane] = static_cast<std::uint32_t>(lane ^ 16) << 20;
        want_words[kWarp + lane] = bit_cast<std::uint32_t>(nearest_tf32(values[lane]));
        want_words[2 * kWarp + lane] = static_cast<std::uint32_t>(lane);
    }
    expect_equal(floats.host(), want, "shuffles and shared memory");
    expect_equal(words.host(), want_words, "shuffle_xor of words, to_tf32, shared_address");
    expect_equal(arrived.host(), {static_cast<int>(kBlocks)}, "atomic_add");
    expect_equal(last.host(), {1}, "the last block");
}

// ---- numeric.h, on the host

// Rounds to `bits` bits after the leading one, ties to even, in double; `least`: the exponent of the smallest normal.
double rounded(double value, int bits, int least) {
    if (value == 0) return value;
    const int exponent = std::max(std::ilogb(value), least);
    return std::ldexp(std::nearbyint(std::ldexp(value, bits - exponent)), exponent - bits);
}

template <class T>
void test_numeric(const char* name, int bits, int least) {
    std::mt19937 random(7);
    for (int i = 0; i < 100000; ++i) {
        const float value =
            static_cast<float>(std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 46) - 50));
        const double want = rounded(value, bits, least);
        if (want > 60000) continue;
        expect(to_float(from_float<T>(value)) == want, std::string(name) + ": from_float");
        expect(to_float(from_float<T>(-value)) == -want, std::string(name) + ": from_float of a negative value");
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float infinity = std::numeric_limits<float>::infinity();
    float values[kChunk<T>];
    for (int i = 0; i < kChunk<T>; ++i) {
        values[i] = static_cast<float>(i) - 2.5f;
    }
    values[0] = nan;
    values[1] = -infinity;
    float back[kChunk<T>];
    const uint4 chunk = pack<T>(values);
    unpack<T>(chunk, back);
    const auto elements = bit_cast<std::array<T, kChunk<T>>>(chunk);
    for (int i = 0; i < kChunk<T>; ++i) {
        const bool same = i == 0 ? std::isnan(back[0]) && std::isnan(to_float(elements[0]))
                                 : back[i] == values[i] && to_float(elements[i]) == values[i];
        expect(same, std::string(name) + ": pack and unpack of element " + std::to_string(i));
    }
}

}  // namespace

}  // namespace resnet_fused

int main() {
    using namespace resnet_fused;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 77;  // nothing to run on
    testing::in_every_order(8, [] {
        test_ldmatrix();
        test_mma<Bf16>("mma_16816<Bf16>");
        test_mma<Fp16>("mma_16816<Fp16>");
        test_mma<float>("mma_1688_tf32");
        test_tf32_operands();
        test_copies();
        test_odds_and_ends();
    });
    test_numeric<Bf16>("Bf16", 7, -126);
    test_numeric<Fp16>("Fp16", 10, -14);
    test_numeric<float>("float", 23, -126);
    return testing::report("mma");
}
