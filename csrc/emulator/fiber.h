// A function that runs on its own stack and hands over to others of its kind (ucontext to start, longjmp from then on).

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace resnet_fused::emulator {

class Fiber {
  public:
    Fiber() = default;  // stands for the caller, on the caller's stack
    explicit Fiber(void (*entry)());
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Forgets where the function is: it begins anew when it is next resumed. Nothing on its stack is destroyed.
    void restart() { started_ = false; }

    // Stops `from`, which runs, and goes on with `to`; returns when somebody resumes `from`. The entry must not return.
    static void exchange(Fiber& from, Fiber& to);

  private:
    static void begin();
    void arrive();  // bookkeeping of the address sanitizer

    jmp_buf context_;
    ucontext_t start_;
    void (*entry_)() = nullptr;
    void* stack_ = nullptr;  // its lowest page is not accessible
    std::size_t bytes_ = 0;
    void* fake_stack_ = nullptr;
    bool started_ = false;
};

}  // namespace resnet_fused::emulator
