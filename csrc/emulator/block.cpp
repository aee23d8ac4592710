#include "emulator/block.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "emulator/language.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace resnet_fused::emulator {

namespace {

constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp, as bits
constexpr unsigned kMostWarps = 32;

unsigned bit(unsigned position) {
    return 1u << position;
}

}  // namespace

Settings& settings() {
    static Settings instance;
    return instance;
}

Block the_block;

void fail(const std::string& what) {
    throw Error(block().where() + ": " + what);
}

std::string Block::where() const {
    if (!running_) return "outside of a kernel";
    return std::string(threads_[current_]->function) + ", block " + std::to_string(blockIdx.x) + ", thread " +
           std::to_string(current_);
}

void Block::run(unsigned grid, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body) {
    count_ = threads;
    body_ = &body;
    while (threads_.size() < threads) {
        threads_.push_back(std::make_unique<Thread>(&Block::thread_main));
    }
    gridDim = dim3(grid);
    blockDim = dim3(threads);
    random_ = Random(settings().seed);
    std::vector<unsigned> order(grid);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = grid; i > 1; --i) {
        std::swap(order[i - 1], order[random_.below(i)]);
    }
    for (const unsigned index : order) {
        shared.reset(shared_bytes, threads);
        run_block(index);
    }
}

void Block::run_block(unsigned index) {
    blockIdx = uint3{index, 0, 0};
    const unsigned warps = count_ / kLanes;
    warps_.assign(warps, Warp());
    ready_.assign(warps, kAll);
    ready_warps_ = warps == kMostWarps ? kAll : bit(warps) - 1;
    meetings_.clear();
    copies.reset(count_);
    products.reset(warps);
    for (unsigned i = 0; i < count_; ++i) {
        threads_[i]->exited = false;
        threads_[i]->function = "the kernel";
    }
    constexpr unsigned kStay[] = {0, 60000, 65300, 65536};
    stay_ = kStay[random_.below(std::size(kStay))];
    left_ = count_;
    error_ = nullptr;
    current_ = random_.bit(ready_warps_) * kLanes;
    current_ = next();
    threadIdx = uint3{current_, 0, 0};
    running_ = true;
    Fiber::exchange(host_, threads_[current_]->fiber);
    running_ = false;
    if (!error_) return;
    for (const auto& thread : threads_) {
        thread->fiber.restart();  // most are in the middle of the kernel
    }
    std::rethrow_exception(error_);
}

// A fiber runs the same thread of one block after the other.
void Block::thread_main() {
    Block& self = block();
    while (true) {
        try {
            (*self.body_)();
            self.leave();
            if (self.left_ > 0) self.suspend();  // until the next block
        } catch (...) {
            self.error_ = std::current_exception();
        }
        // Not in the handler: the C++ runtime keeps a list of those under way, which fibers share.
        if (self.error_ || self.left_ == 0) Fiber::exchange(self.threads_[self.current_]->fiber, self.host_);
    }
}

// The running thread is at its end.
void Block::leave() {
    enter("the end");
    threads_[current_]->exited = true;
    Warp& own = warps_[warp()];
    own.exited |= bit(current_ % kLanes);
    if (own.arrived != 0) {
        fail(std::string("the thread exits, others of its warp wait in ") + own.function);
    }
    if (--left_ > 0) return;
    copies.check_done();
    products.check_done();
}

unsigned Block::next() {
    while (ready_warps_ == 0) {
        if (!copies.advance()) throw Error("deadlock in block " + std::to_string(blockIdx.x) + ": " + waiting());
    }
    unsigned from = warp();
    if (ready_[from] == 0 || random_.below(65536) >= stay_) from = random_.bit(ready_warps_);
    const unsigned lane = random_.bit(ready_[from]);
    ready_[from] &= ~bit(lane);
    if (ready_[from] == 0) ready_warps_ &= ~bit(from);
    return from * kLanes + lane;
}

void Block::wake(unsigned thread) {
    ready_[thread / kLanes] |= bit(thread % kLanes);
    ready_warps_ |= bit(thread / kLanes);
}

void Block::suspend() {
    const unsigned to = next();
    if (to == current_) return;
    Fiber& from = threads_[current_]->fiber;
    current_ = to;
    threadIdx.x = to;
    Fiber::exchange(from, threads_[to]->fiber);
}

// True in the lane that comes last; the others return once it has released the warp.
bool Block::gather(const char* function, std::uint64_t key, void* operand) {
    enter(function);
    Warp& own = warps_[warp()];
    const unsigned lane = current_ % kLanes;
    if (own.exited != 0) fail("other threads of the warp have exited");
    if (own.arrived == 0) {
        own.function = function;
        own.key = key;
    } else if (own.function != function && std::strcmp(own.function, function) != 0) {
        fail(std::string("other threads of the warp are in ") + own.function);
    } else if (own.key != key) {
        fail("other threads of the warp are there with other arguments");
    }
    own.operands[lane] = operand;
    own.arrived |= bit(lane);
    if (own.arrived == kAll) return true;
    suspend();
    return false;
}

void Block::release(unsigned warp) {
    warps_[warp].arrived = 0;
    ready_[warp] |= warp == this->warp() ? kAll & ~bit(current_ % kLanes) : kAll;
    ready_warps_ |= bit(warp);
}

void Block::meet(const char* function, int id, unsigned count) {
    const std::uint64_t key = static_cast<std::uint64_t>(id) << 32 | count;
    if (!gather(function, key, nullptr)) return;
    if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + ", expected 0 to 15");
    if (count == 0 || count % kLanes != 0 || count > count_) {
        fail(std::to_string(count) + " threads, expected whole warps of the block");
    }
    Meeting& meeting = meetings_[id];
    if (meeting.warps.empty()) meeting.count = count;
    if (meeting.count != count) {
        fail("barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads, others wait there for " +
             std::to_string(meeting.count));
    }
    meeting.warps.push_back(warp());
    if (meeting.warps.size() * kLanes < count) {
        suspend();
        return;
    }
    shared.races.meet(meeting.warps);
    for (const unsigned met : meeting.warps) {
        release(met);
    }
    meeting.warps.clear();
}

// "threads 0-31 in ldmatrix_x4 (14 of 32 lanes), threads 32-63 in barrier_wait (...)"
std::string Block::waiting() const {
    const auto state = [this](unsigned thread) {
        const Thread& one = *threads_[thread];
        if (one.exited) return std::string("have exited");
        const unsigned lanes = static_cast<unsigned>(__builtin_popcount(warps_[thread / kLanes].arrived));
        std::string text = std::string("wait in ") + one.function;
        if (lanes != 0 && lanes != kLanes) text += " (" + std::to_string(lanes) + " of 32 lanes)";
        return text + copies.awaited(thread);
    };
    std::string text;
    for (unsigned begin = 0, end; begin < count_; begin = end) {
        const std::string common = state(begin);
        end = begin + 1;
        while (end < count_ && state(end) == common)
            ++end;
        if (begin > 0) text += "; ";
        text += "threads " + std::to_string(begin) + "-" + std::to_string(end - 1) + " " + common;
    }
    return text + copies.under_way();
}

}  // namespace resnet_fused::emulator
