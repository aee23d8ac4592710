// What becomes of a tile's accumulators: the target is written, and what its columns sum up to is kept.
//
//     fprop  out = [relu](acc + bias + residual), rounded once; mean and M2 of the rounded values
//     dgrad  dx = acc + skip_scale * masked(skip); behind a deferred activation 0 where x * scale + shift <= 0;
//     rounded;
//            dbeta = sum dx, dgamma = sum dx * (x - mean) * rstd of the rounded values
//
// A warp's accumulators are fragments of mma.sync (and of wgmma): of every 8 columns a lane has two neighbours. The
// four lanes of a row exchange what they have of 32 columns, after which each has 8 neighbouring channels of a row, and
// all memory is read and written 16 bytes at a time.
//
// Statistics: a tile's deviations are taken from a pivot, the mean of the rows so far (of the first tile: its first
// row), and merged by Chan's rule: the error of M2 stays at the rounding of the deviations from the mean, since a tile
// that lies far from the pivot lies as far from the merged mean. One state a warp and column lives in shared memory for
// all of the program's tiles; the order of everything is fixed.

#pragma once

#include "batch_norm/merge.h"
#include "common/mma.h"
#include "common/numeric.h"
#include "conv3x3/operand.cuh"
#include "conv3x3/problem.h"

namespace resnet_fused::conv3x3 {

constexpr int kLaneChannels = 8;    // neighbouring channels of a row that a lane has after the exchange
constexpr int kGroupColumns = 32;   // columns of one exchange
constexpr int kGroupFragments = 4;  // of 8 columns each
constexpr int kChains = 4;          // merged side by side

// The 2 values that a lane has of each of 4 fragments become the 8 values of fragment lane % 4.
__device__ __forceinline__ void exchange(float (&v)[kLaneChannels], int lane) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int fragment = 0; fragment < kGroupFragments; ++fragment) {
            if (fragment & distance) continue;
            float* const low = v + 2 * fragment;
            float* const high = v + 2 * (fragment + distance);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float got = shuffle_xor(upper ? low[i] : high[i], distance);
                (upper ? low[i] : high[i]) = got;
            }
        }
    }
}

// Sums over the 8 rows that lanes with the same lane % 4 have: v[0] is then the sum of column lane / 4.
__device__ __forceinline__ void sum_rows(float (&v)[kLaneChannels], int lane) {
#pragma unroll
    for (int half = kLaneChannels / 2; half > 0; half /= 2) {
        const bool upper = lane & (4 * half);
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float got = shuffle_xor(upper ? v[i] : v[i + half], 4 * half);
            v[i] = (upper ? v[i + half] : v[i]) + got;
        }
    }
}

// 8 neighbouring channels of a row, of which `valid` exist; zeros beyond.
template <class T>
__device__ __forceinline__ void load_channels(const void* tensor, std::int64_t element, int valid, bool vector,
                                              float (&v)[kLaneChannels]) {
    const T* const from = static_cast<const T*>(tensor) + element;
#pragma unroll
    for (int i = 0; i < kLaneChannels; i += kChunk<T>) {
        float chunk[kChunk<T>] = {};
        if (vector && i < valid) {
            unpack<T>(load_global16(from + i), chunk);
        } else if (!vector) {
#pragma unroll
            for (int j = 0; j < kChunk<T>; ++j) {
                if (i + j < valid) chunk[j] = to_float(from[i + j]);
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
            v[i + j] = chunk[j];
        }
    }
}

// Rounds the values to what is stored, and stores them.
template <class T>
__device__ __forceinline__ void store_channels(void* tensor, std::int64_t element, int valid, bool vector,
                                               float (&v)[kLaneChannels]) {
    T* const to = static_cast<T*>(tensor) + element;
#pragma unroll
    for (int i = 0; i < kLaneChannels; i += kChunk<T>) {
        float chunk[kChunk<T>];
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
            chunk[j] = v[i + j];
        }
        const uint4 packed = pack<T>(chunk);
        unpack<T>(packed, chunk);
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
            v[i + j] = chunk[j];
            if (!vector && i + j < valid) to[i + j] = from_float<T>(chunk[j]);
        }
        if (vector && i < valid) store_global16(to + i, packed);
    }
}

// Vectors over the columns of an n-tile, in shared memory: of every 8 columns the 8 values of each vector.
enum Vector : int { kBias = 0, kScale = 0, kShift = 1, kMean = 2 };

template <Direction kDirection>
constexpr int kVectors = kDirection == Direction::kFprop ? 1 : 3;

// Bytes of an n-tile's vectors.
template <Direction kDirection>
RESNET_FUSED_HOST_DEVICE constexpr std::uint32_t vector_bytes(int columns) {
    return static_cast<std::uint32_t>(columns * kVectors<kDirection> * sizeof(float));
}

// Puts them at `vectors`. The threads synchronise before finish_tile().
template <Direction kDirection>
__device__ __forceinline__ void load_vectors(const ConvParams& p, int tile_n, int columns, std::uint32_t vectors,
                                             int thread, int threads) {
    const float* const of[] = {kDirection == Direction::kFprop ? p.forward.bias : p.backward.scale, p.backward.shift,
                               p.backward.mean};
    for (int column = thread; column < columns; column += threads) {
        const int channel = tile_n * columns + column;
        const int group = column / kLaneChannels * kVectors<kDirection>;
#pragma unroll
        for (int i = 0; i < kVectors<kDirection>; ++i) {
            const bool given = of[i] != nullptr && channel < p.target_channels;
            const int at = (group + i) * kLaneChannels + column % kLaneChannels;
            store_shared_float(vectors + static_cast<std::uint32_t>(at * sizeof(float)), given ? of[i][channel] : 0.0f);
        }
    }
}

// 8 values of a vector; `vectors` is the place of their columns.
__device__ __forceinline__ void load_vector(std::uint32_t vectors, Vector vector, float (&v)[kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; i += 4) {
        const auto at = static_cast<std::uint32_t>((vector * kLaneChannels + i) * sizeof(float));
        float four[4];
        unpack<float>(load_shared16(vectors + at), four);
        v[i] = four[0];
        v[i + 1] = four[1];
        v[i + 2] = four[2];
        v[i + 3] = four[3];
    }
}

// What a lane sums up of its 8 channels: of deviations and their squares, or of dx and dx * (x - mean).
struct Sums {
    float first[kLaneChannels];
    float second[kLaneChannels];
};

// How many of a lane's channels exist, given that one does: all where they are one chunk.
template <class T>
__device__ __forceinline__ int valid_channels(const ConvParams& p, int channel, bool vector) {
    return vector && kChunk<T> == kLaneChannels ? kLaneChannels : p.target_channels - channel;
}

// One row's 8 channels of fprop, from the accumulators to the rounded result.
template <class T>
__device__ __forceinline__ void finish_forward(const ConvParams& p, std::uint32_t vectors, int pixel, int channel,
                                               bool vector, float (&v)[kLaneChannels]) {
    const bool inside = pixel >= 0 && channel < p.target_channels;
    const int valid = valid_channels<T>(p, channel, vector);
    const std::int64_t element = element_of(pixel, p.target_channels, channel);
    if (p.forward.bias != nullptr) {
        float bias[kLaneChannels];
        load_vector(vectors, kBias, bias);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            v[i] += bias[i];
        }
    }
    if (p.forward.residual != nullptr && inside) {
        float residual[kLaneChannels];
        load_channels<T>(p.forward.residual, element, valid, vector, residual);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            v[i] += residual[i];
        }
    }
    if (p.forward.relu) {
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            v[i] = v[i] <= 0.0f ? 0.0f : v[i];
        }
    }
    if (inside) store_channels<T>(p.out, element, valid, vector, v);
}

// One row's 8 channels of dgrad; adds to the sums.
template <class T>
__device__ __forceinline__ void finish_backward(const ConvParams& p, std::uint32_t vectors, int pixel, int channel,
                                                bool vector, float (&v)[kLaneChannels], Sums& sums) {
    const Backward& end = p.backward;
    if (pixel < 0 || channel >= p.target_channels) return;
    const int valid = valid_channels<T>(p, channel, vector);
    const std::int64_t element = element_of(pixel, p.target_channels, channel);
    if (end.skip != nullptr) {
        std::uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kLaneChannels; i += kChunk<T>) {
            bits |= mask_bits<T>(end.skip_mask, element + i, valid - i, vector) << i;
        }
        float skip[kLaneChannels];
        load_channels<T>(end.skip, element, valid, vector, skip);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            v[i] = fmaf(end.skip_scale, bits >> i & 1 ? skip[i] : 0.0f, v[i]);
        }
    }
    float x[kLaneChannels];
    if (end.x != nullptr) {
        float scale[kLaneChannels];
        float shift[kLaneChannels];
        load_channels<T>(end.x, element, valid, vector, x);
        load_vector(vectors, kScale, scale);
        load_vector(vectors, kShift, shift);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            v[i] = fmaf(x[i], scale[i], shift[i]) <= 0.0f ? 0.0f : v[i];
        }
    }
    store_channels<T>(p.out, element, valid, vector, v);
    if (end.mean != nullptr) {
        float mean[kLaneChannels];
        load_vector(vectors, kMean, mean);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
            sums.first[i] += v[i];
            sums.second[i] = fmaf(v[i], x[i] - mean[i], sums.second[i]);
        }
    }
}

// The state of column `column` of a warp: mean and M2 so far, or the two sums.
__device__ __forceinline__ std::uint32_t state_of(std::uint32_t state, int column) {
    return state + static_cast<std::uint32_t>(column * 2 * sizeof(float));
}

// The means of 8 columns.
__device__ __forceinline__ void load_means(std::uint32_t state, float (&mean)[kLaneChannels]) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; i += 2) {
        const uint4 pairs = load_shared16(state_of(state, i));
        mean[i] = bit_cast<float>(pairs.x);
        mean[i + 1] = bit_cast<float>(pairs.z);
    }
}

// Merges a tile's `rows` deviations from the state's mean into the state, `done` rows of which it has.
__device__ __forceinline__ void merge_tile(std::uint32_t state, float sum, float squares, int rows, int done) {
    const float n = static_cast<float>(rows);
    const float delta = sum / n;
    const float m2 = squares - sum * delta;
    const float share = n / static_cast<float>(rows + done);
    store_shared_float(state, fmaf(delta, share, load_shared_float(state)));
    const float merged = (m2 < 0.0f ? 0.0f : m2) + delta * delta * share * static_cast<float>(done);
    store_shared_float(state + sizeof(float), load_shared_float(state + sizeof(float)) + merged);
}

// Writes a warp's part of a tile and updates its state.
//
// acc: the warp's fragments; m: grid position of its first row; column: target channel of its first column; vectors:
// shared address of load_vectors()' result at that column; state: shared address of kFn * 8 pairs of floats, zeros
// before the first tile; rows_done: rows that the state has, 0 before the first; vector: p.vector_target, which some
// kernels know.
template <Direction kDirection, class T, int kFm, int kFn>
__device__ __forceinline__ void finish_tile(const ConvParams& p, const Class& cls, const float (&acc)[kFm][kFn][4],
                                            int m, int column, std::uint32_t vectors, std::uint32_t state,
                                            int& rows_done, bool vector) {
    constexpr bool kFprop = kDirection == Direction::kFprop;
    const int lane = threadIdx.x % 32;
    const int rows = min(positions(p.plan) - m, 16 * kFm);
    if (rows <= 0) return;
    const bool sums_rows = kFprop ? p.forward.statistics : p.backward.mean != nullptr;
    int pixel[kFm][2];
#pragma unroll
    for (int i = 0; i < kFm; ++i) {
        pixel[i][0] = target_pixel(p.plan, cls, m + 16 * i + lane / 4);
        pixel[i][1] = target_pixel(p.plan, cls, m + 16 * i + lane / 4 + 8);
    }
#pragma unroll
    for (int group = 0; group < kFn / kGroupFragments; ++group) {
        const int channel = column + kGroupColumns * group + kLaneChannels * (lane % 4);
        const int first_column = kGroupColumns * group + kLaneChannels * (lane % 4);
        const std::uint32_t own_vectors = vectors + vector_bytes<kDirection>(first_column);
        Sums sums{};
#pragma unroll
        for (int i = 0; i < kFm; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float v[kLaneChannels];
#pragma unroll
                for (int j = 0; j < kLaneChannels; ++j) {
                    v[j] = acc[i][kGroupFragments * group + j / 2][2 * half + j % 2];
                }
                exchange(v, lane);
                if constexpr (kDirection != Direction::kFprop) {
                    finish_backward<T>(p, own_vectors, pixel[i][half], channel, vector, v, sums);
                    continue;
                }
                finish_forward<T>(p, own_vectors, pixel[i][half], channel, vector, v);
                if (!sums_rows) continue;
                if (i == 0 && half == 0) {
                    if (rows_done == 0 && lane < 4) {
#pragma unroll
                        for (int j = 0; j < kLaneChannels; ++j) {
                            store_shared_float(state_of(state, first_column + j), v[j]);
                        }
                    }
                    warp_sync();
                }
                if (pixel[i][half] < 0) continue;
                float pivot[kLaneChannels];
                load_means(state_of(state, first_column), pivot);
#pragma unroll
                for (int j = 0; j < kLaneChannels; ++j) {
                    const float deviation = v[j] - pivot[j];
                    sums.first[j] += deviation;
                    sums.second[j] = fmaf(deviation, deviation, sums.second[j]);
                }
            }
        }
        if (!sums_rows) continue;
        sum_rows(sums.first, lane);
        sum_rows(sums.second, lane);
        warp_sync();
        const std::uint32_t own = state_of(state, first_column + lane / 4);
        if (kFprop) {
            merge_tile(own, sums.first[0], sums.second[0], rows, rows_done);
        } else {
            store_shared_float(own, load_shared_float(own) + sums.first[0]);
            store_shared_float(own + sizeof(float), load_shared_float(own + sizeof(float)) + sums.second[0]);
        }
        warp_sync();
    }
    rows_done += rows;
}

// How many rows a program took: tiles program, program + programs_m, ... of tiles_m, the last of which may be short.
struct RowCounts {
    int tiles;    // of every program,
    int more;     // one more of programs below this one
    int last;     // the program that has the last tile,
    int missing;  // and how many rows it is short of
    int tile_rows;

    __device__ __forceinline__ RowCounts(const ConvParams& p, int rows)
        : tiles(p.tiles_m / p.programs_m),
          more(p.tiles_m % p.programs_m),
          last((p.tiles_m - 1) % p.programs_m),
          missing(p.tiles_m * rows - positions(p.plan)),
          tile_rows(rows) {}

    // Rows [from, from + height) of each of its tiles.
    __device__ __forceinline__ std::int64_t of(int program, int from, int height) const {
        const int share = tiles + (program < more);
        const int beyond = program == last ? min(height, max(0, from + height + missing - tile_rows)) : 0;
        return static_cast<std::int64_t>(share) * height - beyond;
    }
};

// Brings a program's column states together and leaves them as a partial result; the last program of the n-tile to
// arrive merges all partials. The order of merging is fixed, whoever comes last.
//
// states: [warp_rows][kColumns] pairs of floats, warp row r having taken rows r * tile_rows / warp_rows and on of each
// tile; flag: shared address of an int; thread of threads call this, and sync() is a barrier among them.
template <Direction kDirection, int kColumns, class Sync>
__device__ __forceinline__ void finish_program(const ConvParams& p, int program, int tile_n, int tile_rows,
                                               std::uint32_t states, int warp_rows, std::uint32_t flag, int thread,
                                               int threads, Sync sync) {
    constexpr bool kFprop = kDirection == Direction::kFprop;
    if (kFprop ? !p.forward.statistics : p.backward.mean == nullptr) return;
    const auto merged = [](const Moments& x, const Moments& y) {
        return kDirection == Direction::kFprop ? merge(x, y) : Moments{0, x.mean + y.mean, x.m2 + y.m2};
    };
    const auto state = [&](int row, int column) {
        const std::uint32_t at = state_of(states, row * kColumns + column);
        return Moments{0, load_shared_float(at), load_shared_float(at + sizeof(float))};
    };
    const int height = tile_rows / warp_rows;
    const int channels = p.target_channels;
    const RowCounts rows(p, tile_rows);
    sync();
    for (int column = thread; column < kColumns; column += threads) {
        const int channel = tile_n * kColumns + column;
        if (channel >= channels) break;
        Moments total{0, 0.0f, 0.0f};
        for (int row = 0; row < warp_rows; ++row) {
            Moments next = state(row, column);
            next.count = rows.of(program, row * height, height);
            total = merged(total, next);
        }
        const std::int64_t at = static_cast<std::int64_t>(program) * channels + channel;
        p.partials.first[at] = total.mean;
        p.partials.second[at] = total.m2;
    }
    thread_fence();
    sync();
    if (thread == 0) store_shared(flag, atomic_add(p.partials.arrived + tile_n, 1));
    sync();
    if (load_shared<int>(flag) != p.programs_m - 1) return;
    thread_fence();
    if (thread == 0) p.partials.arrived[tile_n] = 0;
    // Threads beyond one a column share its partials, each in several chains: what is read next waits for nothing.
    const int sharers = max(1, min(threads / kColumns, warp_rows));
    const volatile float* const first = p.partials.first;
    const volatile float* const second = p.partials.second;
    for (int item = thread; item < kColumns * sharers; item += threads) {
        const int column = item % kColumns;
        const int sharer = item / kColumns;
        const int channel = tile_n * kColumns + column;
        Moments chain[kChains] = {};
        for (int base = sharer; channel < channels && base < p.programs_m; base += sharers * kChains) {
#pragma unroll
            for (int i = 0; i < kChains; ++i) {
                const int other = base + sharers * i;
                if (other >= p.programs_m) continue;
                const std::int64_t at = static_cast<std::int64_t>(other) * channels + channel;
                chain[i] = merged(chain[i], Moments{rows.of(other, 0, tile_rows), first[at], second[at]});
            }
        }
        const Moments total = merged(merged(chain[0], chain[1]), merged(chain[2], chain[3]));
        const std::uint32_t at = state_of(states, sharer * kColumns + column);
        store_shared_float(at, total.mean);
        store_shared_float(at + sizeof(float), total.m2);
    }
    sync();
    for (int column = thread; column < kColumns; column += threads) {
        const int channel = tile_n * kColumns + column;
        if (channel >= channels) break;
        Moments total{0, 0.0f, 0.0f};
        for (int sharer = 0; sharer < sharers; ++sharer) {
            Moments next = state(sharer, column);
            for (int other = sharer; kFprop && other < p.programs_m; other += sharers) {
                next.count += rows.of(other, 0, tile_rows);
            }
            total = merged(total, next);
        }
        (kFprop ? p.forward.mean : p.backward.dbeta)[channel] = total.mean;
        (kFprop ? p.forward.m2 : p.backward.dgamma)[channel] = kFprop ? total.m2 : total.m2 * p.backward.rstd[channel];
    }
    if (kFprop && tile_n == 0 && thread == 0) *p.forward.count = positions(p.plan);
}

}  // namespace resnet_fused::conv3x3
