// Everything: include this.
#pragma once

#include "diffkv/attention.h"  // IWYU pragma: export
#include "diffkv/backend.h"    // IWYU pragma: export
#include "diffkv/batch.h"      // IWYU pragma: export
#include "diffkv/cache.h"      // IWYU pragma: export
#include "diffkv/error.h"      // IWYU pragma: export
#include "diffkv/layer.h"      // IWYU pragma: export
#include "diffkv/plan.h"       // IWYU pragma: export
#include "diffkv/tensor.h"     // IWYU pragma: export
#include "diffkv/version.h"    // IWYU pragma: export
