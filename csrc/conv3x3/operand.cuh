// Operands on their way into shared memory: copied as they are, then formed in place by the threads that copied them.
//
// Shared memory has rows of 128 bytes, one block of channels, swizzled (geometry.h). A thread has a fixed chunk of the
// row (its channels' constants stay in registers) and walks over rows, in copy_rows() as in form_rows(): after its own
// copies have arrived it may form what it copied without waiting for others.

#pragma once

#include "common/mma.h"
#include "common/numeric.h"
#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3 {

// Rows of shared memory that hold grid positions first, first + 1, ...
struct Rows {
    std::uint32_t values;   // shared address of slot 0
    std::uint32_t partner;  // the same for Operand::partner
    int first;              // grid position of the first row
    int count;
    int slot;       // of the first row; the others follow,
    int slot_mask;  // modulo a power of two (slot_mask + 1), or never (-1)
    int channel;    // of the row's first element
};

// Where an element stands in a (pixels, channels) tensor; nothing of it is negative, which saves instructions.
__device__ __forceinline__ std::int64_t element_of(int pixel, int channels, int channel) {
    const auto row =
        static_cast<std::uint64_t>(static_cast<std::uint32_t>(pixel)) * static_cast<std::uint32_t>(channels);
    return static_cast<std::int64_t>(row + static_cast<std::uint32_t>(channel));
}

// Bits of the elements of one chunk that the mask lets through.
template <class T>
__device__ __forceinline__ std::uint32_t mask_bits(const Mask& mask, std::int64_t element, int valid, bool vector) {
    constexpr int kCount = kChunk<T>;
    if (mask.sign == Sign::kNone || valid <= 0) return ~0u;
    if (mask.sign == Sign::kBits) {
        const auto* const bytes = static_cast<const std::uint8_t*>(mask.data);
        if (vector) return bytes[element >> 3] >> (element & 7) & ((1u << kCount) - 1);
        std::uint32_t bits = 0;
#pragma unroll 1
        for (int i = 0; i < min(valid, kCount); ++i) {
            bits |= static_cast<std::uint32_t>(bytes[(element + i) >> 3] >> ((element + i) & 7) & 1) << i;
        }
        return bits;
    }
    const T* const values = static_cast<const T*>(mask.data) + element;
    std::uint32_t bits = 0;
    if (vector) {
        float v[kCount];
        unpack<T>(load_global16(values), v);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            bits |= static_cast<std::uint32_t>(!(v[i] <= 0.0f)) << i;
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < min(valid, kCount); ++i) {
            bits |= static_cast<std::uint32_t>(!(to_float(values[i]) <= 0.0f)) << i;
        }
    }
    return bits;
}

// The constants of one chunk's channels: zeros where there are none, so that what lies beyond the tensor stays zero.
template <class T>
struct Constants {
    float a[kChunk<T>];
    float b[kChunk<T>];
    float c[kChunk<T>];
};

template <class T>
__device__ __forceinline__ Constants<T> constants_of(const Operand& operand, int channel) {
    Constants<T> constants;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
        const bool inside = channel + i < operand.channels;
        constants.a[i] = !inside ? 0.0f : operand.a == nullptr ? 1.0f : operand.a[channel + i];
        constants.b[i] = inside && operand.b != nullptr ? operand.b[channel + i] : 0.0f;
        constants.c[i] = inside && operand.c != nullptr ? operand.c[channel + i] : 0.0f;
    }
    return constants;
}

template <class T>
__device__ __forceinline__ uint4 form_chunk(const Operand& operand, const Constants<T>& constants, uint4 values,
                                            uint4 partner, std::uint32_t bits) {
    float v[kChunk<T>];
    unpack<T>(values, v);
    if (operand.form == Form::kActivated) {
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
            const float z = fmaf(v[i], constants.a[i], constants.c[i]);
            v[i] = z <= 0.0f ? 0.0f : z;
        }
        return pack<T>(v);
    }
    if (operand.mask.sign != Sign::kNone) {
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
            v[i] = bits >> i & 1 ? v[i] : 0.0f;
        }
    }
    if (operand.partner != nullptr) {
        float y[kChunk<T>];
        unpack<T>(partner, y);
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
            v[i] = fmaf(constants.a[i], v[i], fmaf(y[i], constants.b[i], constants.c[i]));
        }
    } else if (operand.a != nullptr) {
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
            v[i] *= constants.a[i];
        }
    }
    return pack<T>(v);
}

// One chunk into shared memory, zeros where `pixel` is -1 and for channels beyond the tensor.
template <class T>
__device__ __forceinline__ void copy_chunk(std::uint32_t to, const void* tensor, int pixel, int channel, int channels,
                                           bool vector) {
    const T* const from = static_cast<const T*>(tensor);
    const int valid = pixel < 0 ? 0 : channels - channel;
    if (vector) {
        const std::int64_t at = valid > 0 ? static_cast<std::int64_t>(pixel) * channels + channel : 0;
        cp_async16(to, from + at, valid > 0);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < kChunk<T>; ++i) {
        const T value =
            i < valid ? from[static_cast<std::int64_t>(pixel) * channels + channel + i] : from_float<T>(0.0f);
        store_shared(to + i * static_cast<std::uint32_t>(sizeof(T)), value);
    }
}

__device__ __forceinline__ int slot_of(const Rows& rows, int row) {
    return (rows.slot + row) & rows.slot_mask;
}

__device__ __forceinline__ int pixel_of(const Plan& plan, const Fill& fill, int e) {
    if (!contiguous(plan, fill)) return source_pixel(plan, fill, e);
    return e >= 0 && e < positions(plan) ? e : -1;
}

// The pixel of a grid position, -1 for none: of a fill, and of a tensor whose pixels are the grid itself.
struct FillPixels {
    const Plan& plan;
    const Fill& fill;
    __device__ __forceinline__ int operator()(int e) const { return pixel_of(plan, fill, e); }
};

struct GridPixels {
    int count;
    __device__ __forceinline__ int operator()(int e) const { return e >= 0 && e < count ? e : -1; }
};

// Begins the copies of a block of rows by `threads` threads (a multiple of 8). The caller commits and waits.
template <class T, class Pixels>
__device__ __forceinline__ void copy_rows(const Pixels& pixels, const Operand& operand, const Rows& rows, int thread,
                                          int threads, bool vector) {
    const int chunk = thread % kRowChunks;
    const int channel = rows.channel + chunk * kChunk<T>;
#pragma unroll 1
    for (int row = thread / kRowChunks; row < rows.count; row += threads / kRowChunks) {
        const int pixel = pixels(rows.first + row);
        const std::uint32_t at = swizzled(slot_of(rows, row), chunk);
        copy_chunk<T>(rows.values + at, operand.values, pixel, channel, operand.channels, vector);
        if (operand.partner != nullptr) {
            copy_chunk<T>(rows.partner + at, operand.partner, pixel, channel, operand.channels, vector);
        }
    }
}

template <class T>
__device__ __forceinline__ void copy_rows(const Plan& plan, const Fill& fill, const Operand& operand, const Rows& rows,
                                          int thread, int threads, bool vector) {
    copy_rows<T>(FillPixels{plan, fill}, operand, rows, thread, threads, vector);
}

// Whether an operand is used as it was copied.
RESNET_FUSED_HOST_DEVICE bool is_plain(const Operand& operand) {
    return operand.form == Form::kPlain;
}

// Forms what copy_rows() of the same thread has brought, with the constants of its chunk. Rows [keep_first, keep_first
// + keep_count) are also written to `keep` (null for none), a tensor like the operand: each chunk that lies inside it.
template <class T, class Pixels>
__device__ __forceinline__ void form_rows(const Pixels& pixels, const Operand& operand, const Constants<T>& constants,
                                          const Rows& rows, int thread, int threads, bool vector, void* keep,
                                          int keep_first, int keep_count) {
    constexpr int kBatch = 4;  // rows whose bits of the mask are under way together: 8 bits each
    const int chunk = thread % kRowChunks;
    const int channel = rows.channel + chunk * kChunk<T>;
    const int valid = operand.channels - channel;
    const int stride = threads / kRowChunks;
    const bool masked = operand.mask.sign != Sign::kNone;
    if (valid <= 0) return;
#pragma unroll 1
    for (int first = thread / kRowChunks; first < rows.count; first += kBatch * stride) {
        std::uint32_t bits = ~0u;
        if (masked) {
            bits = 0;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int row = first + i * stride;
                const std::int64_t pixel = row < rows.count ? max(pixels(rows.first + row), 0) : 0;
                bits |= mask_bits<T>(operand.mask, pixel * operand.channels + channel, valid, vector) << 8 * i;
            }
        }
#pragma unroll 1
        for (int row = first; row < min(first + kBatch * stride, rows.count); row += stride, bits >>= 8) {
            const std::uint32_t at = swizzled(slot_of(rows, row), chunk);
            const uint4 partner = operand.partner != nullptr ? load_shared16(rows.partner + at) : uint4{0, 0, 0, 0};
            const uint4 formed = form_chunk<T>(operand, constants, load_shared16(rows.values + at), partner, bits);
            store_shared16(rows.values + at, formed);
            if (keep == nullptr || row < keep_first || row >= keep_first + keep_count) continue;
            const std::int64_t pixel = pixels(rows.first + row);
            if (pixel < 0) continue;
            T* const to = static_cast<T*>(keep) + pixel * operand.channels + channel;
            if (vector) {
                store_global16(to, formed);
                continue;
            }
            float v[kChunk<T>];
            unpack<T>(formed, v);
#pragma unroll
            for (int i = 0; i < kChunk<T>; ++i) {
                if (i < valid) to[i] = from_float<T>(v[i]);
            }
        }
    }
}

template <class T>
__device__ __forceinline__ void form_rows(const Plan& plan, const Fill& fill, const Operand& operand, const Rows& rows,
                                          int thread, int threads, bool vector, void* keep, int keep_first,
                                          int keep_count) {
    const Constants<T> constants = constants_of<T>(operand, rows.channel + thread % kRowChunks * kChunk<T>);
    form_rows<T>(FillPixels{plan, fill}, operand, constants, rows, thread, threads, vector, keep, keep_first,
                 keep_count);
}

}  // namespace resnet_fused::conv3x3
