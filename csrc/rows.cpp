#include "rows.h"

#include <torch/headeronly/util/Exception.h>

namespace bincomm {
namespace {

// One clone set per type; the loops are plain so that compilers vectorize them for each instruction set.
#define BINCOMM_CONVERSIONS(Type)                                                                          \
  BINCOMM_CLONES void load_##Type(const void* row, int64_t offset, int64_t count, float* out) {            \
    const Type::stored* in = static_cast<const Type::stored*>(row) + offset;                               \
    for (int64_t j = 0; j < count; ++j) out[j] = Type::load(in[j]);                                        \
  }                                                                                                        \
  BINCOMM_CLONES void store_##Type(const float* in, int64_t count, void* row, int64_t offset) {            \
    Type::stored* out = static_cast<Type::stored*>(row) + offset;                                          \
    for (int64_t j = 0; j < count; ++j) out[j] = Type::store(in[j]);                                       \
  }

BINCOMM_CONVERSIONS(Float)
BINCOMM_CONVERSIONS(BFloat16)
BINCOMM_CONVERSIONS(Half)

}  // namespace

Storage storage_of(ScalarType dtype, const char* argument) {
  switch (dtype) {
    case ScalarType::Float:
      return {load_Float, store_Float, true};
    case ScalarType::BFloat16:
      return {load_BFloat16, store_BFloat16, false};
    case ScalarType::Half:
      return {load_Half, store_Half, false};
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, float16 or bfloat16, got dtype ", static_cast<int>(dtype));
  }
}

}  // namespace bincomm
