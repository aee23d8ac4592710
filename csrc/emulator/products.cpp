#include "emulator/products.h"

#include <cstring>
#include <string>

#include "common/numeric.h"
#include "emulator/block.h"

namespace resnet_fused::emulator {

namespace {

constexpr int kRows = 16;  // of a warp's A and D
constexpr int kMostColumns = 256;

// Every fp16 as float; converting one takes the host longer than looking it up.
const float* fp16_values() {
    static const std::vector<float> values = [] {
        std::vector<float> all(1 << 16);
        for (std::uint32_t bits = 0; bits < all.size(); ++bits) {
            all[bits] = __half2float(bit_cast<Fp16>(static_cast<std::uint16_t>(bits)));
        }
        return all;
    }();
    return values.data();
}

// An element of 16 bits as float.
struct Decoder {
    explicit Decoder(Element element) : fp16(element == Element::fp16 ? fp16_values() : nullptr) {}
    float operator()(std::uint16_t bits) const {
        return fp16 != nullptr ? fp16[bits] : bit_cast<float>(std::uint32_t{bits} << 16);
    }
    const float* fp16;
};

// The chip reads the upper 19 bits of a tf32 operand.
float tf32(std::uint32_t word) {
    return bit_cast<float>(word & 0xffffe000u);
}

int row_of(int lane, int word) {
    return lane / 4 + 8 * (word % 2);
}

// A of a warp, from the lanes' words.
template <class LaneWords>
void decode_a(Decoder decode, const LaneWords& words, float (&a)[kRows][16]) {
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t word = words(lane)[i];
            float* const to = &a[row_of(lane, i)][2 * (lane % 4) + 8 * (i / 2)];
            to[0] = decode(static_cast<std::uint16_t>(word));
            to[1] = decode(static_cast<std::uint16_t>(word >> 16));
        }
    }
}

// D += A * B for `kColumns` columns of `b` and of the lanes' fragments from `d(lane)` on; sums in fp32, k ascending.
template <int kColumns, int kDepth, class LaneFloats>
void multiply_add(const float (&a)[kRows][16], const float* b, int b_stride, const LaneFloats& d) {
    for (int row = 0; row < kRows; ++row) {
        float sums[kColumns];
        for (int t = 0; t < 4; ++t) {
            const float* const from = d(row % 8 * 4 + t) + row / 8 * 2;
            for (int i = 0; i < kColumns / 8; ++i) {
                sums[8 * i + 2 * t] = from[4 * i];
                sums[8 * i + 2 * t + 1] = from[4 * i + 1];
            }
        }
        for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < kColumns; ++column) {
                sums[column] += a[row][k] * b[k * b_stride + column];
            }
        }
        for (int t = 0; t < 4; ++t) {
            float* const to = d(row % 8 * 4 + t) + row / 8 * 2;
            for (int i = 0; i < kColumns / 8; ++i) {
                to[4 * i] = sums[8 * i + 2 * t];
                to[4 * i + 1] = sums[8 * i + 2 * t + 1];
            }
        }
    }
}

// B of a wgmma, row k of the result at b + k * kMostColumns.
//   K-major: element (k, n) at n % 8 * 128 + n / 8 * stride + k * 2 bytes
//   MN-major: at n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride bytes
// from the start address, and then swizzled. [Strides, Canonical Layouts, Matrix Descriptor Format]
void decode_b(Decoder decode, std::uint64_t descriptor, int n, bool transposed, float* b) {
    constexpr int kDepth = 16;
    constexpr int kChunkElements = 8;
    const auto field = [descriptor](int shift) {
        return static_cast<std::uint32_t>(descriptor >> shift & 0x3fff) << 4;
    };
    const std::uint32_t start = field(0);
    const std::uint32_t leading = field(16);
    const std::uint32_t stride = field(32);
    constexpr std::uint32_t kPattern = 1024;  // bytes after which the swizzle repeats
    constexpr std::uint64_t kFields = 0x3fffu | std::uint64_t{0x3fff} << 16 | std::uint64_t{0x3fff} << 32;
    if ((descriptor & ~kFields) != std::uint64_t{1} << 62)
        fail("a descriptor that is not of the 128-byte swizzle alone");
    if (start / 128 % 8 != 0) fail("a descriptor that starts within the swizzle's pattern");
    if (start % 128 > (transposed ? 0u : 96u)) fail("a descriptor that reads beyond a row of 128 bytes");
    if (stride % kPattern != 0) fail("a stride that is not a multiple of the swizzle's pattern");
    if (transposed && n > 64 && leading % kPattern != 0) fail("a leading offset that is not a multiple of the pattern");
    const unsigned thread = block().thread();
    const auto chunk = [thread](std::uint32_t address, std::uint16_t (&elements)[kChunkElements]) {
        std::memcpy(elements, block().shared.read_async(swizzled(address), thread), sizeof(elements));
    };
    std::uint16_t elements[kChunkElements];
    if (transposed) {
        for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < n; column += kChunkElements) {
                const auto at = static_cast<unsigned>(column);
                const auto row = static_cast<unsigned>(k);
                chunk(start + at % 64 * 2 + at / 64 * leading + row % 8 * 128 + row / 8 * stride, elements);
                for (int i = 0; i < kChunkElements; ++i) {
                    b[k * kMostColumns + column + i] = decode(elements[i]);
                }
            }
        }
        return;
    }
    for (int column = 0; column < n; ++column) {
        for (int k = 0; k < kDepth; k += kChunkElements) {
            const auto at = static_cast<unsigned>(column);
            chunk(start + at % 8 * 128 + at / 8 * stride + static_cast<unsigned>(k) * 2, elements);
            for (int i = 0; i < kChunkElements; ++i) {
                b[(k + i) * kMostColumns + column] = decode(elements[i]);
            }
        }
    }
}

}  // namespace

void Products::reset(unsigned warps) {
    warps_.assign(warps, Warp());
    warpgroups_.assign((warps + kWarpgroup - 1) / kWarpgroup, {});
}

void Products::load_matrices(Row& row, bool transposed) {
    const auto load = [transposed](const Operands& lanes) {
        const unsigned first = block().warp() * kLanes;
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            std::uint16_t elements[8][8];
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned lane = matrix * 8 + i;
                const std::uint32_t address = static_cast<const Row*>(lanes[lane])->address;
                std::memcpy(elements[i], block().shared.read(address, 16, first + lane), 16);
            }
            for (unsigned lane = 0; lane < kLanes; ++lane) {
                const unsigned g = lane / 4;
                const unsigned t = lane % 4 * 2;
                const std::uint32_t low = transposed ? elements[t][g] : elements[g][t];
                const std::uint32_t high = transposed ? elements[t + 1][g] : elements[g][t + 1];
                static_cast<Row*>(lanes[lane])->r[matrix] = low | high << 16;
            }
        }
    };
    block().collective(transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", 0, &row, load);
}

void Products::multiply(Element type, Fragments& fragments) {
    const auto product = [type](const Operands& lanes) {
        const auto of = [&lanes](int lane) { return static_cast<Fragments*>(lanes[static_cast<unsigned>(lane)]); };
        const Decoder decode(type);
        float a[kRows][16];
        float b[16][8];
        decode_a(decode, [&of](int lane) { return of(lane)->a; }, a);
        for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
            for (int i = 0; i < 2; ++i) {
                const std::uint32_t word = of(lane)->b[i];
                b[2 * (lane % 4) + 8 * i][lane / 4] = decode(static_cast<std::uint16_t>(word));
                b[2 * (lane % 4) + 8 * i + 1][lane / 4] = decode(static_cast<std::uint16_t>(word >> 16));
            }
        }
        multiply_add<8, 16>(a, &b[0][0], 8, [&of](int lane) { return of(lane)->d; });
    };
    block().collective("mma_16816", static_cast<std::uint64_t>(type), &fragments, product);
}

void Products::multiply_tf32(Fragments& fragments) {
    const auto product = [](const Operands& lanes) {
        const auto of = [&lanes](int lane) { return static_cast<Fragments*>(lanes[static_cast<unsigned>(lane)]); };
        float a[kRows][16];
        float b[8][8];
        for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
            for (int i = 0; i < 4; ++i) {
                a[row_of(lane, i)][lane % 4 + 4 * (i / 2)] = tf32(of(lane)->a[i]);
            }
            for (int i = 0; i < 2; ++i) {
                b[lane % 4 + 4 * i][lane / 4] = tf32(of(lane)->b[i]);
            }
        }
        multiply_add<8, 8>(a, &b[0][0], 8, [&of](int lane) { return of(lane)->d; });
    };
    block().collective("mma_1688_tf32", 0, &fragments, product);
}

void Products::fence() {
    block().collective("wgmma_fence", 0, nullptr, [this](const Operands&) { warps_[block().warp()].fenced = true; });
}

void Products::multiply(Element type, int n, bool transposed, WarpgroupFragments& fragments) {
    const std::uint64_t kind = static_cast<std::uint64_t>(type) | static_cast<std::uint64_t>(transposed) << 1 |
                               static_cast<std::uint64_t>(n) << 2;
    block().collective("wgmma", kind, &fragments, [&](const Operands& lanes) {
        Product product{type, n, transposed, fragments.b, {}};
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            product.lanes[lane] = *static_cast<const WarpgroupFragments*>(lanes[lane]);
            if (product.lanes[lane].b != product.b) fail("lanes of a warp with different descriptors");
        }
        issue(kind, product);
    });
}

void Products::issue(std::uint64_t kind, const Product& product) {
    const unsigned warp = block().warp();
    Warp& own = warps_[warp];
    std::vector<Issued>& group = warpgroups_[warp / kWarpgroup];
    if (warp / kWarpgroup * kWarpgroup + kWarpgroup > block().warps()) fail("a warpgroup of less than 4 warps");
    if (!own.fenced) fail("no wgmma_fence since the last wgmma_commit");
    if (own.issued == group.size()) group.push_back({kind, product.b});
    const Issued& common = group[own.issued++];
    if (common.kind != kind || common.b != product.b) fail("warps of a warpgroup with different products");
    own.open.push_back(product);
    if (settings().mode == Mode::eager) run(product);
}

void Products::run(const Product& product) const {
    static float b[16 * kMostColumns];
    const Decoder decode(product.type);
    float a[kRows][16];
    decode_a(decode, [&product](int lane) { return product.lanes[static_cast<unsigned>(lane)].a; }, a);
    decode_b(decode, product.b, product.n, product.transposed, b);
    constexpr int kColumns = 32;  // at a time; divides every n
    for (int column = 0; column < product.n; column += kColumns) {
        multiply_add<kColumns, 16>(a, b + column, kMostColumns, [&product, column](int lane) {
            return product.lanes[static_cast<unsigned>(lane)].d + column / 8 * 4;
        });
    }
}

void Products::commit() {
    block().collective("wgmma_commit", 0, nullptr, [this](const Operands&) {
        Warp& own = warps_[block().warp()];
        own.groups.push_back(std::move(own.open));
        own.open.clear();
        own.fenced = false;
    });
}

void Products::wait(unsigned left) {
    block().collective("wgmma_wait", left, nullptr, [this, left](const Operands&) {
        Warp& own = warps_[block().warp()];
        for (; own.groups.size() > left; own.groups.pop_front()) {
            if (settings().mode == Mode::eager) continue;
            for (const Product& product : own.groups.front()) {
                run(product);
            }
        }
    });
}

void Products::check_done() const {
    for (unsigned warp = 0; warp < warps_.size(); ++warp) {
        const std::string who = "warp " + std::to_string(warp);
        if (!warps_[warp].open.empty() || !warps_[warp].groups.empty()) fail("products of " + who + " are under way");
        if (warps_[warp].issued != warpgroups_[warp / kWarpgroup].size()) {
            fail(who + " has issued fewer products than its warpgroup");
        }
    }
}

}  // namespace resnet_fused::emulator
