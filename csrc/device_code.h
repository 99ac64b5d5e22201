#pragma once

#include <tuple>

namespace bincomm {

// See the Python docstring in bindings.cpp.
std::tuple<int, int, bool> device_code(int device);

}  // namespace bincomm
