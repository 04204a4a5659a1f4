// How fast a GPU reads its memory in one launch, from cold caches.
#pragma once

#include <memory>

#include "device/session.h"

namespace diffkv::device {

// `session` must outlive it. Throws Error(kUnavailable).
std::unique_ptr<ColdReads> make_cuda_cold_reads(const Session& session);

}  // namespace diffkv::device
