#undef _FORTIFY_SOURCE  // its longjmp refuses to leave the stack

#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace resnet_fused::emulator {

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 1 << 20;  // instrumented frames are several times larger
#else
constexpr std::size_t kStackBytes = 1 << 18;
#endif

Fiber* previous = nullptr;  // who handed over, and to whom
Fiber* current = nullptr;

}  // namespace

Fiber::Fiber(void (*entry)()) : entry_(entry), bytes_(kStackBytes) {
    stack_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
}

Fiber::~Fiber() {
    if (entry_ != nullptr) munmap(stack_, bytes_);
}

void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (previous->entry_ == nullptr) {  // the caller's stack is known to the sanitizer alone
        previous->stack_ = const_cast<void*>(bottom);
        previous->bytes_ = size;
    }
#endif
}

void Fiber::begin() {
    current->arrive();
    current->entry_();
}

void Fiber::exchange(Fiber& from, Fiber& to) {
    previous = &from;
    current = &to;
#ifdef __SANITIZE_ADDRESS__
    if (!to.started_) {
        to.fake_stack_ = nullptr;
        __asan_unpoison_memory_region(to.stack_, to.bytes_);  // what a function that never returned has left
    }
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.bytes_);
#endif
    if (_setjmp(from.context_) != 0) {
        from.arrive();
        return;
    }
    if (to.started_ || to.entry_ == nullptr) _longjmp(to.context_, 1);
    to.started_ = true;
    getcontext(&to.start_);
    to.start_.uc_stack.ss_sp = to.stack_;
    to.start_.uc_stack.ss_size = to.bytes_;
    to.start_.uc_link = nullptr;
    makecontext(&to.start_, &Fiber::begin, 0);
    setcontext(&to.start_);
}

}  // namespace resnet_fused::emulator
