// Which configurations run a problem, in the order in which they are tried where nothing was measured.

#pragma once

#include <vector>

#include "conv3x3/launch.h"

namespace resnet_fused::conv3x3 {

// The plan of one direction.
Plan plan_of(const Geometry& geometry, Direction direction, Feed feed);

// What each configuration that can run the problem on `device` (the current one) needs, the built-in rule's choice
// first. `params` has what plan_* read of it but for the plan, which follows from the geometry and the configuration.
std::vector<Launch> possible(const Geometry& geometry, Type type, Direction direction, ConvParams params, int device);
std::vector<Launch> possible(const Geometry& geometry, Type type, WgradParams params, int device);

// Where a launch goes.
void run(const Launch& launch, Type type, Direction direction, const ConvParams& params, const ConvMaps& maps,
         cudaStream_t stream);
void run(const Launch& launch, Type type, const WgradParams& params, cudaStream_t stream);

}  // namespace resnet_fused::conv3x3
