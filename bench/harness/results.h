// Results as JSON, to keep and to compare.
#pragma once

#include <string>
#include <string_view>

#include "bench/harness/run.h"

namespace diffkv::bench {

// Indented, with units in the names; docs/performance.md describes the fields.
std::string to_json(const RunResult& result);

// Reads what to_json wrote, or another program that measures the same scenarios: needed are the
// scenarios' name, bytes, flops and attend times; of the rest, what is there. `where` names the
// text in messages. Throws Error(kInvalidArgument): not JSON, not a result, fields of other types.
RunResult parse_results(std::string_view text, std::string_view where);

}  // namespace diffkv::bench
