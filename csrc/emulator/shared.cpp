#include "emulator/shared.h"

#include <cstring>
#include <new>
#include <string>

#include "emulator/block.h"

namespace resnet_fused::emulator {

void Shared::reset(std::size_t bytes, unsigned threads) {
    if (bytes != bytes_ || !memory_) {
        constexpr std::size_t kAlignment = 1024;
        void* memory = nullptr;
        if (posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
        memory_.reset(static_cast<unsigned char*>(memory));
        bytes_ = bytes;
    }
    std::memset(memory_.get(), 0xff, bytes_);
    chunks_.assign((bytes_ + kChunkBytes - 1) / kChunkBytes, Chunk());
    fences_.assign(threads, 0);
    now_ = 0;
    races.reset(bytes_, threads);
}

std::uint32_t Shared::address(const void* pointer) const {
    const auto* const byte = static_cast<const unsigned char*>(pointer);
    if (byte < memory_.get() || byte > memory_.get() + bytes_) fail("a pointer that is not to shared memory");
    return static_cast<std::uint32_t>(byte - memory_.get()) + kWindow;
}

std::size_t Shared::offset(std::uint32_t address, std::uint32_t bytes) const {
    if (address % bytes != 0) {
        fail("shared address " + std::to_string(address) + " is not a multiple of " + std::to_string(bytes));
    }
    if (address < kWindow || address - kWindow + bytes > bytes_) {
        fail(std::to_string(bytes) + " bytes at offset " + std::to_string(std::int64_t{address} - kWindow) +
             " are outside of the block's " + std::to_string(bytes_) + " bytes of shared memory");
    }
    return address - kWindow;
}

const unsigned char* Shared::read(std::uint32_t address, std::uint32_t bytes, unsigned thread) {
    const std::size_t at = offset(address, bytes);
    races.read(at, bytes, thread);
    return memory_.get() + at;
}

unsigned char* Shared::write(std::uint32_t address, std::uint32_t bytes, unsigned thread) {
    const std::size_t at = offset(address, bytes);
    Chunk& chunk = chunks_[at / kChunkBytes];
    if (chunk.barrier) fail("a store over a barrier");
    chunk.writer = thread;
    chunk.stored = ++now_;
    races.write(at, bytes, thread);
    return memory_.get() + at;
}

void Shared::check_fenced(const Chunk& chunk, unsigned thread) const {
    if (chunk.stored == 0 || fences_[chunk.writer] > chunk.stored || fences_[thread] > chunk.stored) return;
    fail("no proxy_fence between a store by thread " + std::to_string(chunk.writer) + " and this access");
}

const unsigned char* Shared::read_async(std::uint32_t address, unsigned thread) {
    const std::size_t at = offset(address, kChunkBytes);
    races.read(at, kChunkBytes, thread);
    check_fenced(chunks_[at / kChunkBytes], thread);
    return memory_.get() + at;
}

unsigned char* Shared::write_async(std::uint32_t address, unsigned thread) {
    const std::size_t at = offset(address, kChunkBytes);
    Chunk& chunk = chunks_[at / kChunkBytes];
    if (chunk.barrier) fail("a copy over a barrier");
    races.write(at, kChunkBytes, thread);
    check_fenced(chunk, thread);
    chunk.stored = 0;
    return memory_.get() + at;
}

void Shared::reserve(std::uint32_t address) {
    constexpr std::uint32_t kBarrierBytes = 8;
    const std::size_t at = offset(address, kBarrierBytes);
    chunks_[at / kChunkBytes].barrier = true;
}

}  // namespace resnet_fused::emulator
