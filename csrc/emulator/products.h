// ldmatrix, mma and wgmma of a warp. Fragments as the PTX ISA draws them, with g = lane / 4 and t = lane % 4:
//   A 16x16, four words of two elements: word i holds row g + 8 * (i % 2), columns 2t + 8 * (i / 2) and + 1
//   B 16x8, two words: word i holds column g, rows 2t + 8 * i and + 1
//   D 16x8, four floats: i holds row g + 8 * (i / 2), column 2t + i % 2
//   of tf32, words of one element: A 16x8: row g + 8 * (i % 2), column t + 4 * (i / 2); B 8x8: column g, row t + 4 * i
// [Matrix Fragments for mma.m16n8k16, mma.m16n8k8, wgmma.m64nNk16]
//
// Errors: wgmma without a wgmma_fence since the last commit; a descriptor that the chip would read otherwise than
// meant; warps of a warpgroup with different products; products that nobody waits for.

#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

namespace resnet_fused::emulator {

enum class Element { bf16, fp16 };

// What a lane brings.
struct Row {
    std::uint32_t address;
    std::uint32_t* r;  // [4]
};
struct Fragments {
    float* d;                // [4]
    const std::uint32_t* a;  // [4]
    std::uint32_t b[2];
};
struct WarpgroupFragments {
    float* d;                // [n / 8][4]
    const std::uint32_t* a;  // [4]
    std::uint64_t b;         // descriptor
};

class Products {
  public:
    void reset(unsigned warps);

    void load_matrices(Row& row, bool transposed);
    void multiply(Element type, Fragments& fragments);
    void multiply_tf32(Fragments& fragments);

    void fence();
    void multiply(Element type, int n, bool transposed, WarpgroupFragments& fragments);
    void commit();
    void wait(unsigned left);

    void check_done() const;

  private:
    static constexpr unsigned kWarpgroup = 4;  // warps

    // One wgmma, as far as a warp has to do with it.
    struct Product {
        Element type;
        int n;
        bool transposed;
        std::uint64_t b;
        std::array<WarpgroupFragments, 32> lanes;
    };
    struct Warp {
        bool fenced = false;
        std::vector<Product> open;                // not yet committed
        std::deque<std::vector<Product>> groups;  // not yet waited for
        std::size_t issued = 0;
    };
    // What the warps of a warpgroup must do alike.
    struct Issued {
        std::uint64_t kind;
        std::uint64_t b;
    };

    void issue(std::uint64_t kind, const Product& product);
    void run(const Product& product) const;

    std::vector<Warp> warps_;
    std::vector<std::vector<Issued>> warpgroups_;
};

}  // namespace resnet_fused::emulator
