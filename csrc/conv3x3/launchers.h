// What runs a 3x3 convolution: an object for each direction, problem and configuration.
//
// An object has all of the kernels' parameters but the pointers. In its params_ every tensor that the problem comes
// with is marked by a pointer to nowhere: plan_* ask which there are, and run() takes addresses for exactly these,
// checks them, and launches. run() may be called by several threads at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "conv3x3/arguments.h"
#include "conv3x3/choose.h"
#include "conv3x3/maps.h"

namespace resnet_fused::conv3x3 {

using Address = std::uintptr_t;

// The mark of a tensor that comes with the problem.
template <class T>
T* mark(bool comes) {
    return comes ? reinterpret_cast<T*>(kVectorBytes) : nullptr;
}

inline Mask mask(const char* op, const char* argument, const std::string& name) {
    const auto sign = named<Sign>(kSigns, name, op, argument);
    return {mark<void>(sign != Sign::kNone), sign};
}

inline Operand input_operand(int channels, bool deferred) {
    Operand operand{};
    operand.values = mark<void>(true);
    operand.a = operand.c = mark<float>(deferred);
    operand.channels = channels;
    operand.form = deferred ? Form::kActivated : Form::kPlain;
    return operand;
}

inline Operand gradient_operand(const char* op, int filters, const std::string& sign, bool factor, bool partner) {
    check(factor || !partner, op, "factor", "to be True with partner", "False");
    Operand operand{};
    operand.values = mark<void>(true);
    operand.partner = mark<void>(partner);
    operand.mask = mask(op, "sign", sign);
    operand.a = mark<float>(factor);
    operand.b = operand.c = mark<float>(partner);
    operand.channels = filters;
    operand.form = factor || operand.mask.sign != Sign::kNone ? Form::kGradient : Form::kPlain;
    return operand;
}

// Adds what follows from the problem.
inline ConvParams with_sizes(const Problem& problem, Direction direction, ConvParams params) {
    const bool forward = direction == Direction::kFprop;
    const int c = problem.channels / problem.groups;
    const int k = problem.filters / problem.groups;
    params.weight = mark<void>(true);
    params.out = mark<void>(true);
    params.target_channels = forward ? problem.filters : problem.channels;
    params.group_source = forward ? c : k;
    params.group_target = forward ? k : c;
    params.weight_inner = c;
    params.vector_source = problem.vector(params.source.channels);
    params.vector_weight = problem.vector(c);
    params.vector_target = problem.vector(params.target_channels);
    return params;
}

// What `use` returns with the problem's device current.
template <class Use>
auto on_device(const Problem& problem, Use use) {
    const DeviceGuard guard(problem.device);
    return use();
}

// --- what the directions share --------------------------------------------------------------------------------------

template <class Params>
class Convolution {
  public:
    std::vector<ConfigTuple> configs() const {
        std::vector<ConfigTuple> found;
        for (const Launch& launch : launches_) {
            found.push_back(as_tuple(launch.config));
        }
        return found;
    }

    std::optional<ConfigTuple> config() const {
        if (launches_.empty()) return std::nullopt;
        return as_tuple(launch_.config);
    }

  protected:
    Convolution(const char* op, const Problem& problem, const Params& params, std::vector<Launch> launches,
                const std::optional<ConfigTuple>& config)
        : op_(op), problem_(problem), params_(params), launches_(std::move(launches)) {
        if (config.has_value()) {
            const auto is_asked = [&](const Launch& launch) { return as_tuple(launch.config) == *config; };
            const auto found = std::find_if(launches_.begin(), launches_.end(), is_asked);
            check(found != launches_.end(), op, "config", "to be one that runs the problem", text(*config));
            launch_ = *found;
        } else if (!launches_.empty()) {
            launch_ = launches_.front();
        }
    }

    // Makes a pointer of an address, where the pointer is marked.
    template <class T>
    void set(T*& pointer, Address address, const char* argument, std::uintptr_t alignment) const {
        if (pointer == nullptr) {
            check(address == 0, op_, argument, "to be 0, since the problem has none", address);
            return;
        }
        pointer = reinterpret_cast<T*>(address);
        check_pointer(pointer, op_, argument);
        if (address % alignment == 0) return;
        check(false, op_, argument, ("to be aligned to " + std::to_string(alignment) + " bytes").c_str(), address);
    }

    void set_mask(Mask& mask, Address address, const char* argument, std::uintptr_t alignment) const {
        set(mask.data, address, argument, mask.sign == Sign::kBits ? 1 : alignment);
    }

    void set_gradient(Operand& operand, Address dz, Address sign, Address y, Address a, Address b, Address c,
                      std::uintptr_t alignment) const {
        set(operand.values, dz, "dz", alignment);
        set_mask(operand.mask, sign, "sign", alignment);
        set(operand.partner, y, "y", alignment);
        set(operand.a, a, "a", sizeof(float));
        set(operand.b, b, "b", sizeof(float));
        set(operand.c, c, "c", sizeof(float));
    }

    void set_input(Operand& operand, Address x, Address scale, Address shift, std::uintptr_t alignment) const {
        set(operand.values, x, "x", alignment);
        set(operand.a, scale, "scale", sizeof(float));
        set(operand.c, shift, "shift", sizeof(float));
    }

    // Null where no byte is needed.
    float* workspace_at(Address workspace, std::size_t needed) const {
        float* pointer = mark<float>(needed > 0);
        set(pointer, workspace, "workspace", kVectorBytes);
        return pointer;
    }

    void check_configured() const {
        check(!launches_.empty(), op_, "a problem", "that some configuration can run", "one that none can");
    }

    const char* op_;
    Problem problem_;
    Params params_;
    std::vector<Launch> launches_;
    Launch launch_{};
};

// fprop or dgrad.
class Product : public Convolution<ConvParams> {
  public:
    // Bytes: partial statistics or sums.
    std::size_t workspace() const {
        if (!sums()) return 0;
        return 2 * sizeof(float) * static_cast<std::size_t>(launch_.programs_m) * params_.target_channels;
    }

    // Programs that arrive at each n-tile are counted.
    int counters() const { return sums() ? launch_.tiles_n : 0; }

  protected:
    Product(const char* op, Direction direction, const Problem& problem, const ConvParams& params,
            const std::optional<ConfigTuple>& config)
        : Convolution(
              op, problem, params,
              on_device(problem,
                        [&] { return possible(problem.geometry, problem.type, direction, params, problem.device); }),
              config),
          direction_(direction) {
        params_.plan = plan_of(problem.geometry, direction, launch_.config.feed);
        params_.tiles_m = launch_.tiles_m;
        params_.tiles_n = launch_.tiles_n;
        params_.programs_m = launch_.programs_m;
    }

    bool sums() const { return params_.forward.statistics || params_.backward.mean != nullptr; }
    std::uintptr_t source_alignment() const { return problem_.alignment(params_.vector_source); }
    std::uintptr_t weight_alignment() const { return problem_.alignment(params_.vector_weight); }
    std::uintptr_t target_alignment() const { return problem_.alignment(params_.vector_target); }

    void enqueue(ConvParams& params, Address workspace, Address counters, Address stream) {
        check_configured();
        params.partials.first = workspace_at(workspace, this->workspace());
        if (sums()) {
            params.partials.second =
                params.partials.first + static_cast<std::int64_t>(params.programs_m) * params.target_channels;
        }
        params.partials.arrived = mark<int>(sums());
        set(params.partials.arrived, counters, "counters", sizeof(int));
        const DeviceGuard guard(problem_.device);
        ConvMaps maps{};
        if (launch_.config.chip == Chip::kHopper) maps = maps_.find(launch_, problem_.type, direction_, params);
        conv3x3::run(launch_, problem_.type, direction_, params, maps, reinterpret_cast<cudaStream_t>(stream));
    }

  private:
    Direction direction_;
    MapCache maps_;
};

// --- the directions -------------------------------------------------------------------------------------------------

class Fprop : public Product {
  public:
    Fprop(const Problem& problem, bool deferred, bool bias, bool residual, bool relu, bool statistics,
          const std::optional<ConfigTuple>& config)
        : Product("conv3x3_fprop", Direction::kFprop, problem,
                  params_of(problem, deferred,
                            {mark<float>(bias), mark<void>(residual), relu, statistics, mark<std::int32_t>(statistics),
                             mark<float>(statistics), mark<float>(statistics)}),
                  config) {}

    void run(Address x, Address scale, Address shift, Address weight, Address bias, Address residual, Address out,
             Address count, Address mean, Address m2, Address workspace, Address counters, Address stream) {
        ConvParams params = params_;
        set_input(params.source, x, scale, shift, source_alignment());
        set(params.weight, weight, "weight", weight_alignment());
        set(params.forward.bias, bias, "bias", sizeof(float));
        set(params.forward.residual, residual, "residual", target_alignment());
        set(params.out, out, "out", target_alignment());
        set(params.forward.count, count, "count", sizeof(std::int32_t));
        set(params.forward.mean, mean, "mean", sizeof(float));
        set(params.forward.m2, m2, "m2", sizeof(float));
        enqueue(params, workspace, counters, stream);
    }

  private:
    static ConvParams params_of(const Problem& problem, bool deferred, const Forward& forward) {
        ConvParams params{};
        params.source = input_operand(problem.channels, deferred);
        params.forward = forward;
        return with_sizes(problem, Direction::kFprop, params);
    }
};

class Dgrad : public Product {
  public:
    Dgrad(const Problem& problem, const std::string& sign, bool factor, bool partner, bool deferred, bool sums,
          bool skip, const std::string& skip_sign, bool keep_dy, const std::optional<ConfigTuple>& config)
        : Product(kOp, Direction::kDgrad, problem,
                  params_of(problem, gradient_operand(kOp, problem.filters, sign, factor, partner),
                            backward_of(deferred, sums, skip, skip_sign, keep_dy)),
                  config) {}

    void run(Address dz, Address sign, Address y, Address a, Address b, Address c, Address weight, Address x,
             Address scale, Address shift, Address mean, Address rstd, Address skip, Address skip_sign,
             double skip_scale, Address dx, Address dbeta, Address dgamma, Address dy, Address workspace,
             Address counters, Address stream) {
        ConvParams params = params_;
        set_gradient(params.source, dz, sign, y, a, b, c, source_alignment());
        set(params.weight, weight, "weight", weight_alignment());
        Backward& end = params.backward;
        set(end.x, x, "x", target_alignment());
        set(end.scale, scale, "scale", sizeof(float));
        set(end.shift, shift, "shift", sizeof(float));
        set(end.mean, mean, "mean", sizeof(float));
        set(end.rstd, rstd, "rstd", sizeof(float));
        set(end.skip, skip, "skip", target_alignment());
        set_mask(end.skip_mask, skip_sign, "skip_sign", target_alignment());
        end.skip_scale = static_cast<float>(skip_scale);
        set(params.out, dx, "dx", target_alignment());
        set(end.dbeta, dbeta, "dbeta", sizeof(float));
        set(end.dgamma, dgamma, "dgamma", sizeof(float));
        set(end.dy, dy, "dy", source_alignment());
        enqueue(params, workspace, counters, stream);
    }

  private:
    static constexpr const char* kOp = "conv3x3_dgrad";

    static Backward backward_of(bool deferred, bool sums, bool skip, const std::string& skip_sign, bool keep_dy) {
        check(deferred || !sums, kOp, "deferred", "to be True with sums", "False");
        Backward end{};
        end.x = mark<void>(deferred);
        end.scale = end.shift = mark<float>(deferred);
        end.mean = end.rstd = mark<float>(sums);
        end.dbeta = end.dgamma = mark<float>(sums);
        end.skip = mark<void>(skip);
        end.skip_mask = mask(kOp, "skip_sign", skip_sign);
        check(skip || end.skip_mask.sign == Sign::kNone, kOp, "skip", "to be True with skip_sign", "False");
        end.dy = mark<void>(keep_dy);
        return end;
    }

    static ConvParams params_of(const Problem& problem, const Operand& source, const Backward& backward) {
        check(backward.dy == nullptr || source.form == Form::kGradient, kOp, "keep_dy", "to be False where dy is dz",
              "True");
        ConvParams params{};
        params.source = source;
        params.backward = backward;
        return with_sizes(problem, Direction::kDgrad, params);
    }
};

class Wgrad : public Convolution<WgradParams> {
  public:
    Wgrad(const Problem& problem, const std::string& sign, bool factor, bool partner, bool deferred,
          const std::string& out, const std::optional<ConfigTuple>& config)
        : Wgrad(problem, params_of(problem, gradient_operand(kOp, problem.filters, sign, factor, partner), deferred),
                named<Out>(kOuts, out, kOp, "out"), config) {}

    // Bytes: what each split has summed up, where that is not the result.
    std::size_t workspace() const {
        if (out_ == Out::kFp32 && launch_.splits == 1) return 0;
        return sizeof(float) * static_cast<std::size_t>(launch_.splits) * static_cast<std::size_t>(elements());
    }

    void run(Address dz, Address sign, Address y, Address a, Address b, Address c, Address x, Address scale,
             Address shift, Address dw, Address workspace, Address stream) const {
        check_configured();
        WgradParams params = params_;
        set_gradient(params.dy, dz, sign, y, a, b, c, problem_.alignment(params.vector_dy));
        set_input(params.x, x, scale, shift, problem_.alignment(params.vector_x));
        void* result = mark<void>(true);
        set(result, dw, "dw", kVectorBytes);
        float* const partial = workspace_at(workspace, this->workspace());
        params.partial = partial != nullptr ? partial : static_cast<float*>(result);
        const auto queue = reinterpret_cast<cudaStream_t>(stream);
        const DeviceGuard guard(problem_.device);
        conv3x3::run(launch_, problem_.type, params, queue);
        if (partial != nullptr) run_wgrad_reduce(partial, launch_.splits, elements(), result, out_, queue);
    }

  private:
    static constexpr const char* kOp = "conv3x3_wgrad";

    Wgrad(const Problem& problem, const WgradParams& params, Out out, const std::optional<ConfigTuple>& config)
        : Convolution(
              kOp, problem, params,
              on_device(problem, [&] { return possible(problem.geometry, problem.type, params, problem.device); }),
              config),
          out_(out) {
        params_.plan = plan_of(problem.geometry, Direction::kWgrad, launch_.config.feed);
        params_.blocks_per_split = launch_.blocks_per_split;
        params_.splits = launch_.splits;
    }

    static WgradParams params_of(const Problem& problem, const Operand& dy, bool deferred) {
        WgradParams params{};
        params.x = input_operand(problem.channels, deferred);
        params.dy = dy;
        params.c = problem.channels;
        params.k = problem.filters;
        params.group_c = problem.channels / problem.groups;
        params.group_k = problem.filters / problem.groups;
        params.vector_x = problem.vector(problem.channels);
        params.vector_dy = problem.vector(problem.filters);
        return params;
    }

    long long elements() const { return static_cast<long long>(params_.k) * kTaps * params_.group_c; }

    Out out_;
};

}  // namespace resnet_fused::conv3x3
