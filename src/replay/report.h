// A replay as one HTML page.
#pragma once

#include <string>

#include "replay/stats.h"

namespace diffkv::replay {

// What stands under the page's title.
struct ReportHeading {
  std::string trace;
  std::string setup;
};

// A self-contained page, light or dark as the reader's system: tables of `overall_table` and
// `step_table`, and plots over the replay's clock of what batches were made of, step latency,
// throughput and cache occupancy. No scripts, no outside resources.
std::string html_report(const ReplayResult& result, const Summary& summary,
                        const ReportHeading& heading);

}  // namespace diffkv::replay
