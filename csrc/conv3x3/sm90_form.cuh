// The warps that form an operand on its way into the fills of sm90_pipeline.cuh.
//
// Each of n such warps has every n-th piece of each fill. It brings its pieces, `slots` ahead, by the copy engine or,
// where the pixels are not consecutive, by its threads' own copies; forms them; and writes them to the fill. So it
// waits for other warps only where a fill is still being read.

#pragma once

#include "conv3x3/sm90_pipeline.cuh"

namespace resnet_fused::conv3x3 {

constexpr int kCopySlots = 3;  // where the warps' threads copy: cp_async_wait takes a constant

// What a warp must know of a piece from when it is brought until it is formed.
struct PieceNote {
    int pixel;    // of the first row; its grid position where the warp's threads copy
    int channel;  // first of the block
    int row;      // of the fill
    std::uint32_t marks;
};

// Marks: the warp's first and last piece of a fill, no piece at all, and, a bit for each row, what is kept as dy.
constexpr std::uint32_t kOpens = 1;
constexpr std::uint32_t kCloses = 2;
constexpr std::uint32_t kEnd = 4;
constexpr int kKept = 16;  // bit position of the first row

// Such a warp, as one of its lanes, which has one chunk of the row and every 4th row of a piece. fprop forms an
// activation, or leaves values as they are where it must copy; dgrad forms a gradient. Registers are scarce: notes on
// the pieces, and before them on what is brought next, stand in shared memory.
template <class T, Direction kDirection, class kTile>
struct FormingWarp {
    static constexpr bool kFprop = kDirection == Direction::kFprop;
    static constexpr int kRows = kPieceRows<kDirection>;
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kRowStep = 32 / kRowChunks;
    static constexpr int kLaneRows = kRows / kRowStep;
    static constexpr int kAtOnce = kFprop ? 4 : kTile::kProducerRegisters >= 104 ? 2 : 1;  // rows in registers
    // After a note: how far off its position the pixel is. After the FillStep of what is brought next: the row of the
    // fill, and that of the warp's first piece of a fill.
    static constexpr std::uint32_t kOffset = sizeof(PieceNote);
    static constexpr std::uint32_t kNextRow = sizeof(FillStep);
    static constexpr std::uint32_t kFirstRow = kNextRow + sizeof(int);

    const ConvParams& p;
    const ConvMaps& maps;
    const Places& places;
    const Program& program;
    std::uint32_t pieces;
    std::uint32_t notes;
    int lane;

    __device__ __forceinline__ int row(int i) const { return lane / kRowChunks + i * kRowStep; }
    __device__ __forceinline__ int chunk() const { return lane % kRowChunks; }
    // Place of row i in rows that begin at a multiple of 1024 bytes: a step of 4 rows changes one bit of the swizzle.
    __device__ __forceinline__ std::uint32_t place(std::uint32_t rows, int i) const {
        return ((rows + swizzled(row(0), chunk())) ^ (i % 2 * kRowStep << 4)) + i * kRowStep * kRowBytes;
    }
    __device__ __forceinline__ int channel(const PieceNote& piece) const { return piece.channel + chunk() * kChunk<T>; }
    __device__ __forceinline__ std::uint32_t piece_at(int slot) const {
        return pieces + static_cast<std::uint32_t>(slot) * places.line.piece_bytes;
    }
    __device__ __forceinline__ std::uint32_t note_at(int slot) const {
        return notes + static_cast<std::uint32_t>(slot + 1) * kNoteBytes;
    }
    __device__ __forceinline__ PieceNote note(int slot) const {
        return bit_cast<PieceNote>(load_shared16(note_at(slot)));
    }

    // Whether the warp's own threads copy what the copy engine cannot: pixels that are not consecutive.
    __device__ __forceinline__ bool copies() const { return kFprop && p.plan.source_stride != 1; }

    // --- bringing ---

    __device__ __forceinline__ void bring(int slot) const {
        if (lane == 0) bring_next(slot);
        warp_sync();
        if constexpr (kFprop) {
            if (!copies()) return;
            copy(slot);
            cp_async_commit();
        }
    }

    // By one lane: the note, and the copy engine's part.
    __device__ __forceinline__ void bring_next(int slot) const {
        auto step = bit_cast<FillStep>(load_shared16(notes));
        PieceNote note{0, 0, 0, kEnd};
        if (step.valid(program)) {
            const Fill& fill = p.plan.fill[step.fill];
            const int fill_row = load_shared<int>(notes + kNextRow);
            const int first_row = load_shared<int>(notes + kFirstRow);
            const int next_row = fill_row + places.line.forming * kRows;
            const bool closes = next_row >= kTile::kRows + fill.extra;
            const int position = step.first_row(p, kTile::kRows) + fill.lo + fill_row;
            note = {position, step.channel, fill_row,
                    (fill_row == first_row ? kOpens : 0) | (closes ? kCloses : 0) | keeps(step, fill_row, position)};
            const int offset = pixel_offset(p.plan, fill);
            if (copies()) {
                store_shared(note_at(slot) + kOffset, offset);
            } else {
                note.pixel += offset;
                load(note, piece_at(slot), note_at(slot) + kNoteBarrier);
            }
            if (closes) step.advance(p, program, kWeightRows);
            store_shared16(notes, bit_cast<uint4>(step));
            store_shared(notes + kNextRow, closes ? first_row : next_row);
        }
        store_shared16(note_at(slot), bit_cast<uint4>(note));
    }

    // dy is kept by the tiles of the first class, where a fill holds them unshifted.
    __device__ __forceinline__ std::uint32_t keeps(const FillStep& step, int fill_row, int position) const {
        const Fill& fill = p.plan.fill[step.fill];
        if (kFprop || p.backward.dy == nullptr || program.n != 0 || step.cls != 0 || !holds_tile(p.plan, fill)) {
            return 0;
        }
        static_assert(kFprop || kRows <= 32 - kKept, "a bit for each row");
        const int own = fill_row + fill.lo;  // row of the tile
        const int from = min(max(-own, 0), kRows);
        const int to = max(min(min(kTile::kRows - own, positions(p.plan) - position), kRows), from);
        return ((1u << to) - (1u << from)) << kKept;
    }

    __device__ __forceinline__ void load(const PieceNote& note, std::uint32_t to, std::uint32_t full) const {
        const bool partner = !kFprop && p.source.partner != nullptr;
        barrier_arrive_expect(full, partner ? 2 * kBytes : kBytes);
        tma_load_2d(to, &maps.values, full, note.channel, note.pixel);
        if (partner) tma_load_2d(to + kBytes, &maps.partner, full, note.channel, note.pixel);
    }

    // By all lanes. Rows whose pixel is outside the image are never read: they get any other pixel.
    __device__ __forceinline__ void copy(int slot) const {
        const PieceNote piece = note(slot);
        if (piece.marks & kEnd) return;
        const Plan& plan = p.plan;
        const int offset = load_shared<int>(note_at(slot) + kOffset);
        const int last = plan.images * plan.source_h * plan.source_w - 1;
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            const int position = min(max(piece.pixel + row(i), 0), positions(plan) - 1);
            const Position at = position_of(plan, position);
            const int line = at.image * plan.source_h + at.row * plan.source_stride;
            const int pixel = line * plan.source_w + at.column * plan.source_stride + offset;
            const bool valid = channel(piece) < p.source.channels;
            const std::int64_t element =
                valid ? element_of(min(max(pixel, 0), last), p.source.channels, channel(piece)) : 0;
            cp_async16(place(piece_at(slot), i), static_cast<const T*>(p.source.values) + element, valid);
        }
    }

    // --- forming ---

    // The mask's bits of the lane's rows, one byte each. Nothing is done with what is loaded: the loads are under way
    // together. Rows beyond the tensor are never read: they get any other pixel's.
    __device__ __forceinline__ void load_bits(const PieceNote& piece, std::uint32_t (&bits)[kLaneRows]) const {
        const Mask& mask = p.source.mask;
        if (mask.sign == Sign::kNone || piece.marks & kEnd || channel(piece) >= p.source.channels) return;
        const auto element = [&](int i) {
            return element_of(min(max(piece.pixel + row(i), 0), positions(p.plan) - 1), p.source.channels,
                              channel(piece));
        };
        if (mask.sign == Sign::kBits) {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                bits[i] = static_cast<const std::uint8_t*>(mask.data)[element(i) >> 3];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) {
                bits[i] = mask_bits<T>(mask, element(i), kChunk<T>, true);
            }
        }
    }

    __device__ __forceinline__ uint4 formed(const Constants<T>& constants, uint4 values, uint4 partner,
                                            std::uint32_t bits) const {
        if (kFprop && is_plain(p.source)) return values;
        Operand source = p.source;
        source.form = kFprop ? Form::kActivated : Form::kGradient;
        return form_chunk<T>(source, constants, values, partner, bits);
    }

    // From `from` to the piece's rows of the fill at `fill`.
    __device__ __forceinline__ void form(const PieceNote& piece, const Constants<T>& constants, std::uint32_t bits,
                                         std::uint32_t from, std::uint32_t fill) const {
        const std::uint32_t to = fill + static_cast<std::uint32_t>(piece.row * kRowBytes);
#pragma unroll
        for (int first = 0; first < kLaneRows; first += kAtOnce) {
            uint4 values[kAtOnce];
            uint4 partner[kAtOnce] = {};
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                values[i] = load_shared16(place(from, first + i));
                if (kFprop || p.source.partner == nullptr) continue;
                partner[i] = load_shared16(place(from, first + i) + kBytes);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int shift = kFprop ? 0 : 8 * (first + i);
                const uint4 result = formed(constants, values[i], partner[i], bits >> shift);
                store_shared16(place(to, first + i), result);
                if (!kFprop) keep(piece, row(first + i), result);
            }
        }
    }

    __device__ __forceinline__ void keep(const PieceNote& piece, int row, uint4 result) const {
        if (!(piece.marks >> (kKept + row) & 1)) return;
        T* const dy = static_cast<T*>(p.backward.dy);
        store_global16(dy + element_of(piece.pixel + row, p.source.channels, channel(piece)), result);
    }

    __device__ __forceinline__ void run(int first_row) const {
        const ConvPipeline& line = places.line;
        if (lane == 0) {
            FillStep step{};
            step.begin(p, program, program.m);
            store_shared16(notes, bit_cast<uint4>(step));
            store_shared(notes + kNextRow, first_row);
            store_shared(notes + kFirstRow, first_row);
        }
        for (int slot = 0; slot < line.slots; ++slot) {
            bring(slot);
        }
        Ring slots;
        Ring fills;
        Constants<T> constants = {};
        std::uint32_t bits[kLaneRows];
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) {
            bits[i] = ~0u;
        }
        if constexpr (!kFprop) load_bits(note(0), bits);
        while (true) {
            const int slot = slots.place;
            PieceNote piece = note(slot);
            if (piece.marks & kEnd) break;
            if (channel(piece) >= p.source.channels) piece.marks &= (1u << kKept) - 1;  // nothing to keep
            if (piece.marks & kOpens) {
                constants = constants_of<T>(p.source, channel(piece));
                barrier_wait(places.fill_empty(fills.place), fills.phase ^ 1);
            }
            if (copies()) {
                cp_async_wait<kCopySlots - 1>();
            } else {
                barrier_wait(note_at(slot) + kNoteBarrier, slots.phase);
            }
            slots.advance(line.slots);
            std::uint32_t now = ~0u;
            if constexpr (!kFprop) {
                static_assert(kLaneRows == 4, "a byte for each row");
                now = bits[0] | bits[1] << 8 | bits[2] << 16 | bits[3] << 24;
                load_bits(note(slots.place), bits);  // on their way while this piece is formed
            }
            form(piece, constants, now, piece_at(slot), places.fill(fills.place));
            warp_sync();
            if (piece.marks & kCloses) {
                if (lane == 0) barrier_arrive(places.fill_full(fills.place));
                fills.advance(line.fills);
            }
            bring(slot);
        }
    }
};

}  // namespace resnet_fused::conv3x3
