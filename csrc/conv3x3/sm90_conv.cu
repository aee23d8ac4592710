// Which launches of the Hopper fprop and dgrad there are; sm90_conv.cuh has the kernel.

#include <algorithm>
#include <limits>

#include "common/tensor_map.h"
#include "conv3x3/sm90_conv.cuh"

namespace resnet_fused::conv3x3 {

namespace {

constexpr int kReach = 1024;  // of copies beyond the last pixel, at most: a tile and a copy
constexpr int kMinStages = 3;
constexpr int kMaxStages = 8;
constexpr int kAheadStages = 3;  // of the ring that are kept for copies under way
constexpr int kMinSlots = 2;
constexpr int kEnoughSlots = 3;  // before the weights' ring grows
constexpr int kMaxSlots = 8;
constexpr int kMinFills = 2;
constexpr int kMaxFills = 3;

using Kernel = void (*)(ConvParams, ConvMaps, ConvPipeline);

struct Choice {
    Kernel kernel;
    int consumers;
    int fragments;  // of 16 rows, of a warp
    unsigned threads;
};

template <class T, Direction kDirection, int kConsumers, int kFm, int kColumns>
bool offer(const Config& config, Choice& choice) {
    using kTile = WgmmaTile<kConsumers, kFm, kColumns>;
    if (config.rows != kTile::kRows || config.columns != kColumns) return false;
    choice = {sm90_conv3x3_kernel<T, kDirection, kTile>, kConsumers, kFm, kTile::kThreads};
    return true;
}

template <class T, Direction kDirection>
bool choose(const Config& config, Choice& choice) {
    return offer<T, kDirection, 2, 2, 128>(config, choice) || offer<T, kDirection, 3, 1, 128>(config, choice) ||
           offer<T, kDirection, 2, 1, 128>(config, choice) || offer<T, kDirection, 2, 2, 64>(config, choice) ||
           offer<T, kDirection, 2, 1, 64>(config, choice);
}

// The kernel of a configuration; false where there is none.
bool choose(const Config& config, Type type, Direction direction, Choice& choice) {
    if (config.chip != Chip::kHopper) return false;
    const bool fprop = direction == Direction::kFprop;
    if (type == Type::kBf16) {
        return fprop ? choose<Bf16, Direction::kFprop>(config, choice)
                     : choose<Bf16, Direction::kDgrad>(config, choice);
    }
    if (type == Type::kFp16) {
        return fprop ? choose<Fp16, Direction::kFprop>(config, choice)
                     : choose<Fp16, Direction::kDgrad>(config, choice);
    }
    return false;
}

int piece_rows_of(Direction direction) {
    return direction == Direction::kFprop ? kPieceRows<Direction::kFprop> : kPieceRows<Direction::kDgrad>;
}

int round_up(int amount, int to) {
    return static_cast<int>(ceil_div(amount, to)) * to;
}

// Sets the offsets for the numbers of places.
void place(ConvPipeline& line, const Config& config, int consumers, Direction direction) {
    const bool fprop = direction == Direction::kFprop;
    std::uint32_t at = 0;
    const auto take = [&](int count, std::uint32_t bytes) {
        const std::uint32_t from = at;
        at += static_cast<std::uint32_t>(count) * bytes;
        return from;
    };
    take(line.fills * line.fill_rows, kRowBytes);
    line.weights = take(line.stages * config.columns, kRowBytes);
    line.pieces = take(line.forming * line.slots, line.piece_bytes);
    line.states = take(consumers * kWarps * config.columns, 2 * sizeof(float));
    line.zeros = take(1, kRowBytes);
    line.vectors = take(
        1, fprop ? vector_bytes<Direction::kFprop>(config.columns) : vector_bytes<Direction::kDgrad>(config.columns));
    line.notes = take(line.forming * (line.slots + 1), kNoteBytes);
    line.flag = take(1, 16);
    line.barriers = take(barriers_of(line, consumers), 8);
    line.bytes = at;
}

// Divides shared memory; false if a minimum does not fit.
bool divide(ConvPipeline& line, const Config& config, int consumers, Direction direction, const ConvParams& params,
            bool resident, std::size_t limit) {
    const bool copies = params.plan.source_stride != 1;
    const int blocks = static_cast<int>(ceil_div(params.source.channels, kWeightRows));
    line = {};
    line.resident = resident;
    line.direct = is_plain(params.source) && !copies;
    line.forming = line.direct ? 0 : resident ? kProducerWarps : kProducerWarps - 1;
    const int piece_rows = piece_rows_of(direction);
    line.piece_bytes = static_cast<std::uint32_t>(piece_rows * kRowBytes * (params.source.partner != nullptr ? 2 : 1));
    line.fill_rows = round_up(config.rows + params.plan.extra, line.direct ? kDirectRows : piece_rows);
    line.fills = kMinFills;
    line.slots = line.direct ? 0 : copies ? kCopySlots : kMinSlots;
    line.stages = resident ? taps_of(params.plan) * blocks : kMinStages;
    const auto fits = [&] {
        place(line, config, consumers, direction);
        return line.bytes <= limit;
    };
    if (!fits()) return false;
    const auto grow = [&](int& places, int most) {
        while (places < most) {
            ++places;
            if (fits()) continue;
            --places;
            break;
        }
    };
    const bool short_fills = params.plan.cls[0].fills > 1;  // some serve few taps: two buffers would not even that out
    const int most_slots = line.direct || copies ? line.slots : kMaxSlots;
    if (short_fills) grow(line.fills, kMaxFills);
    grow(line.slots, std::min(kEnoughSlots, most_slots));
    if (!resident) grow(line.stages, kMaxStages);
    grow(line.slots, most_slots);
    grow(line.fills, kMaxFills);
    line.lead = resident ? kTaps : std::max(line.stages - kAheadStages, 0) / (consumers - 1);
    return fits();
}

// The pipeline that `limit` bytes of shared memory allow. With what it takes as the limit it is the same again.
bool pipeline_of(const Config& config, int consumers, Direction direction, const ConvParams& params, std::size_t limit,
                 ConvPipeline& line) {
    return divide(line, config, consumers, direction, params, true, limit) ||
           divide(line, config, consumers, direction, params, false, limit);
}

// Whether the kernels are made for such a problem: whole 16-byte chunks, one group, the form that the direction has, dy
// kept only where a fill holds a tile's own rows, and pixels that the copy engine can count.
bool runs(Direction direction, const ConvParams& params) {
    constexpr std::int64_t kLargest = std::numeric_limits<int>::max();
    const Plan& plan = params.plan;
    const bool one_group = params.group_source == params.source.channels;
    const bool whole = params.vector_source && params.vector_weight && params.vector_target;
    const bool form =
        direction == Direction::kFprop ? params.source.form != Form::kGradient : params.source.form != Form::kActivated;
    const std::int64_t pixels =
        std::int64_t{plan.images} *
        std::max({plan.source_h * plan.source_w, plan.grid_h * plan.grid_w, plan.target_h * plan.target_w});
    const Class& first = plan.cls[0];
    const bool keeps = params.backward.dy == nullptr ||
                       std::any_of(plan.fill + first.first_fill, plan.fill + first.first_fill + first.fills,
                                   [&](const Fill& fill) { return holds_tile(plan, fill); });
    return one_group && whole && form && keeps && pixels > 0 && pixels + plan.extra + kReach < kLargest;
}

// Cycles of one tile of a class, by a model of what limits a multiprocessor: its tensor cores, the bytes of shared
// memory, those from the second-level cache, or its forming warps; then, of the writing of results, what no other
// consumer's products hide.
double tile_cycles(const Class& cls, const Config& config, const Choice& choice, const ConvPipeline& line,
                   Direction direction, const ConvParams& params) {
    constexpr double kProducts = 2048;  // a cycle
    constexpr double kSharedBytes = 128;
    constexpr double kCacheBytes = 40;
    constexpr double kFragmentEnd = 170;  // cycles of a warp's end of 8 rows by 32 columns
    constexpr double kHidden = 0.9;       // of that, at most
    const bool copies = params.plan.source_stride != 1;
    const double masked = params.source.mask.sign != Sign::kNone ? 12 : 0;
    const double form_cycles = direction == Direction::kDgrad ? 30 + masked : copies ? 31 : 20;  // of a warp, a row
    const int partners = params.source.partner != nullptr ? 1 : 0;
    const double blocks = static_cast<double>(ceil_div(params.source.channels, kWeightRows));
    double taps = 0;
    double rows = 0;
    for (int f = cls.first_fill; f < cls.first_fill + cls.fills; ++f) {
        taps += params.plan.fill[f].taps;
        rows += config.rows + params.plan.fill[f].extra;
    }
    const double weights = line.resident ? 0 : taps * config.columns * kRowBytes;
    const double products = taps * config.rows * config.columns * kWeightRows / kProducts;
    const double reads = taps * config.rows * kRowBytes * (1 + config.columns / 64.0);
    const double shared = reads + weights + rows * kRowBytes * (line.direct ? 1 : 3 + 2 * partners);
    const double cache = weights + rows * kRowBytes * (1 + partners);
    const double form = line.direct ? 0 : rows * form_cycles / line.forming;
    const double block = std::max({products, shared / kSharedBytes, cache / kCacheBytes, form});
    const double end = kFragmentEnd * choice.fragments * 2 * config.columns / 32;
    const double hidden = std::min<double>(line.lead, taps) * choice.fragments * 4 * config.columns / 2;
    return blocks * block + std::max(end * (line.lead > 0 ? 1 : choice.consumers) - hidden, (1 - kHidden) * end);
}

// Of the whole launch.
double launch_cycles(const Launch& launch, const Choice& choice, const ConvPipeline& line, Direction direction,
                     const ConvParams& params, int multiprocessors) {
    double all = 0;
    for (int i = 0; i < params.plan.classes; ++i) {
        all += tile_cycles(params.plan.cls[i], launch.config, choice, line, direction, params);
    }
    const std::int64_t rounds = ceil_div(std::int64_t{launch.tiles_m} * params.plan.classes, launch.programs_m);
    return all / params.plan.classes * static_cast<double>(rounds * ceil_div(launch.blocks, multiprocessors));
}

}  // namespace

bool plan_sm90_conv(const Config& config, Type type, Direction direction, const ConvParams& params, int device,
                    Launch& launch) {
    Choice choice;
    ConvPipeline line;
    if (capability(device) != 90 || !runs(direction, params) || !choose(config, type, direction, choice) ||
        !pipeline_of(config, choice.consumers, direction, params, shared_limit(device), line)) {
        return false;
    }
    launch = {};
    launch.config = config;
    launch.threads = choice.threads;
    launch.shared = line.bytes;
    launch.stages = line.stages;
    launch.tiles_m = static_cast<int>(ceil_div(positions(params.plan), config.rows));
    launch.tiles_n = static_cast<int>(ceil_div(params.target_channels, config.columns));
    // As few programs as take no longer: each leaves a partial result.
    const int processors = multiprocessors(device);
    const int at_once = std::max(processors / launch.tiles_n, 1);
    const std::int64_t tiles = std::int64_t{launch.tiles_m} * params.plan.classes;
    launch.programs_m = static_cast<int>(ceil_div(tiles, ceil_div(tiles, at_once)));
    launch.blocks = static_cast<unsigned>(launch.programs_m) * static_cast<unsigned>(launch.tiles_n);
    launch.cycles = launch_cycles(launch, choice, line, direction, params, processors);
    return true;
}

void encode_sm90_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params, ConvMaps& maps) {
    constexpr const char* kOp = "conv3x3";
    const auto element = type == Type::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const Operand& source = params.source;
    const Plan& plan = params.plan;
    maps = {};
    if (plan.source_stride == 1) {
        const auto channels = static_cast<std::uint64_t>(source.channels);
        const std::uint64_t dims[] = {channels, static_cast<std::uint64_t>(positions(plan))};
        const std::uint64_t strides[] = {channels * sizeof(std::uint16_t)};
        const int rows = is_plain(source) ? kDirectRows : piece_rows_of(direction);
        const std::uint32_t box[] = {kWeightRows, static_cast<std::uint32_t>(rows)};
        encode_tiled(&maps.values, element, 2, source.values, dims, strides, box, kOp);
        if (source.partner != nullptr) {
            encode_tiled(&maps.partner, element, 2, source.partner, dims, strides, box, kOp);
        }
    }
    const bool fprop = direction == Direction::kFprop;
    const auto c = static_cast<std::uint64_t>(params.weight_inner);
    const std::uint64_t dims[] = {c, kTaps,
                                  static_cast<std::uint64_t>(fprop ? params.target_channels : source.channels)};
    const std::uint64_t strides[] = {c * sizeof(std::uint16_t), c * kTaps * sizeof(std::uint16_t)};
    const std::uint32_t box[] = {kWeightRows, 1,
                                 static_cast<std::uint32_t>(fprop ? launch.config.columns : kWeightRows)};
    encode_tiled(&maps.weight, element, 3, params.weight, dims, strides, box, kOp);
}

void run_sm90_conv(const Launch& launch, Type type, Direction direction, const ConvParams& params, const ConvMaps& maps,
                   cudaStream_t stream) {
    Choice choice{};
    ConvPipeline line;
    choose(launch.config, type, direction, choice);
    pipeline_of(launch.config, choice.consumers, direction, params, launch.shared, line);
    resnet_fused::launch(choice.kernel, launch.blocks, launch.threads, launch.shared, stream, params, maps, line);
}

}  // namespace resnet_fused::conv3x3
