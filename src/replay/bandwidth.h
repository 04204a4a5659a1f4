// The floor of reading: how fast this machine's threads read memory.
#pragma once

namespace diffkv::replay {

// Bytes per second at which all OpenMP threads together read a buffer of 256 MiB front to back,
// each its own share: the best of eight passes after one that touches the pages. Takes a fraction
// of a second.
double measure_read_bandwidth();

}  // namespace diffkv::replay
