// The shared memory of one block, and the rules of its use:
//   addresses inside the block's allocation, aligned to the access (its 32-bit window begins at kWindow);
//   no store over a barrier; no two accesses, one of them a store, that nothing orders (races.h);
//   wgmma and tensor copies (the async proxy) touch what a thread stored only past a proxy_fence, later than the store,
//   of that thread or of the one that issues them. [PTX ISA: Proxies; Membar/Fence]

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator/races.h"

namespace resnet_fused::emulator {

constexpr std::uint32_t kWindow = 1024;  // a multiple of 1024, not 0: an address that was never set is an error

class Shared {
  public:
    // `bytes` of NaN, whatever the type.
    void reset(std::size_t bytes, unsigned threads);

    unsigned char* data() { return memory_.get(); }
    std::uint32_t address(const void* pointer) const;

    // An Error unless the block has these bytes and `address` is a multiple of `bytes`.
    void check(std::uint32_t address, std::uint32_t bytes) const { offset(address, bytes); }

    // The bytes at `address`, a multiple of `bytes`, for an access of this thread.
    const unsigned char* read(std::uint32_t address, std::uint32_t bytes, unsigned thread);
    unsigned char* write(std::uint32_t address, std::uint32_t bytes, unsigned thread);

    // 16 bytes for an access of the async proxy that this thread issued.
    const unsigned char* read_async(std::uint32_t address, unsigned thread);
    unsigned char* write_async(std::uint32_t address, unsigned thread);
    void proxy_fence(unsigned thread) { fences_[thread] = ++now_; }

    // Gives 8 bytes to a barrier.
    void reserve(std::uint32_t address);

    Races races;

  private:
    static constexpr std::uint32_t kChunkBytes = 16;

    struct Chunk {
        std::uint64_t stored = 0;  // when, in stores and fences of the block; 0 for never, or by the async proxy
        unsigned writer = 0;
        bool barrier = false;
    };
    struct Free {
        void operator()(unsigned char* memory) const { std::free(memory); }
    };

    std::size_t offset(std::uint32_t address, std::uint32_t bytes) const;
    void check_fenced(const Chunk& chunk, unsigned thread) const;

    std::unique_ptr<unsigned char, Free> memory_;
    std::size_t bytes_ = 0;
    std::vector<Chunk> chunks_;
    std::vector<std::uint64_t> fences_;  // of each thread the last
    std::uint64_t now_ = 0;
};

}  // namespace resnet_fused::emulator
