// What only the driver knows.

#pragma once

namespace resnet_fused {

// A function of the driver by name, or null where there is no driver.
void* driver_function(const char* name);

// Whether the process already uses this device (its primary context is active).
bool has_context(int device);

}  // namespace resnet_fused
