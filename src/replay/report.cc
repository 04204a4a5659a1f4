#include "replay/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

#include "replay/plot.h"

namespace diffkv::replay {
namespace {

constexpr int kBins = 200;           // of the time axis
constexpr std::size_t kDots = 3000;  // most dots of a plot

constexpr std::string_view kStyle = R"(
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1b1c1e; --soft: #5c6066;
  --rule: #e2e3e0; --series-0: #2563c9; --series-1: #d9731a; --series-2: #128577; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121315; --card: #1c1e21; --ink: #ececea; --soft: #a3a8af; --rule: #33363b;
    --series-0: #6ea2f5; --series-1: #f0a05a; --series-2: #4fc4b3; --bad: #f2857d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
section, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
section { padding: 16px 18px; margin-top: 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin-top: 20px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 13px; }
.bad b { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 4px; font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 6px; }
svg { display: block; width: 100%; min-width: 480px; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.s0 { --c: var(--series-0); } .s1 { --c: var(--series-1); } .s2 { --c: var(--series-2); }
.legend i { background: var(--c); }
.area { fill: var(--c); fill-opacity: .8; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.dots { fill: none; stroke: var(--c); stroke-width: 4; stroke-linecap: round;
  stroke-opacity: .8; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-top: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
tr:first-child > * { border-top: 0; }
.numbers td, .numbers thead th + th { text-align: right; }
)";

// The mean over time of a step's value in each bin of [0, end); 0 while no step runs.
std::vector<Point> bin(const std::vector<StepRecord>& steps, double end,
                       const std::function<double(const StepRecord&)>& value) {
  std::vector<Point> points(kBins);
  const double width = end / kBins;
  for (int b = 0; b < kBins; ++b) points[static_cast<std::size_t>(b)].x = (b + 0.5) * width;
  for (const StepRecord& step : steps) {
    const double from = step.start_s;
    const double to = from + step.latency_s();
    const int first = std::clamp(static_cast<int>(from / width), 0, kBins - 1);
    const int last = std::clamp(static_cast<int>(to / width), first, kBins - 1);
    for (int b = first; b <= last; ++b) {
      const double overlap = std::min(to, (b + 1) * width) - std::max(from, b * width);
      points[static_cast<std::size_t>(b)].y += value(step) * std::max(overlap, 0.0) / width;
    }
  }
  return points;
}

double highest(const std::vector<Point>& points) {
  double high = 0.0;
  for (const Point& point : points) high = std::max(high, point.y);
  return high;
}

std::vector<Point> scaled(std::vector<Point> points, double factor) {
  for (Point& point : points) point.y *= factor;
  return points;
}

std::string card(std::string_view title, std::string_view note,
                 const std::vector<std::pair<int, std::string>>& legend, const std::string& body) {
  std::string swatches;
  for (const auto& [series, name] : legend) {
    swatches += fmt::format("<span><i class=\"s{}\"></i>{}</span>", series, name);
  }
  return fmt::format(
      "<section>\n<h2>{}</h2>\n<p>{}</p>\n<div class=\"legend\">{}</div>\n{}"
      "</section>\n",
      title, note, swatches, body);
}

std::string batch_card(const std::vector<StepRecord>& steps, const Axis& time) {
  const auto decode = bin(steps, time.high, [](const StepRecord& step) {
    return static_cast<double>(step.decode_tokens);
  });
  const auto all = bin(steps, time.high,
                       [](const StepRecord& step) { return static_cast<double>(step.tokens()); });
  Plot plot("batch", "Tokens of the running step over time",
            fmt::format("Stacked areas: decode tokens below, prefill tokens above; peak {:.0f}.",
                        highest(all)),
            time, linear_axis("tokens per step", highest(all)));
  plot.area(scaled(decode, 0.0), decode, 1);
  plot.area(decode, all, 0);
  return card("Batch make-up", "Query tokens of the running step, averaged over time",
              {{0, "prefill"}, {1, "decode"}}, plot.svg());
}

std::string latency_card(const std::vector<StepRecord>& steps, const Summary& summary,
                         const Axis& time) {
  std::vector<double> values;
  std::array<std::vector<Point>, kNumStepKinds> points;
  const std::size_t stride = steps.size() / kDots + 1;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    values.push_back(steps[i].latency_s() * 1e3);
    if (i % stride == 0) {
      points[static_cast<std::size_t>(steps[i].kind())].push_back(
          {steps[i].start_s, values.back()});
    }
  }
  Plot plot("latency", "Latency of steps over time",
            fmt::format("A dot a step, logarithmic; median {:.3g} ms, 99th percentile {:.3g} ms.",
                        summary.all.p50_s * 1e3, summary.all.p99_s * 1e3),
            time, log_axis("latency, ms (log)", values));
  std::vector<std::pair<int, std::string>> legend;
  for (int k = 0; k < kNumStepKinds; ++k) {
    plot.dots(points[static_cast<std::size_t>(k)], k);
    legend.emplace_back(k, std::string(to_string(static_cast<StepKind>(k))));
  }
  const std::string note =
      stride == 1 ? "A dot a step" : fmt::format("One of every {} steps is shown", stride);
  return card("Step latency", note + "; metadata, cache update and attention of the layers run",
              legend, plot.svg());
}

std::string throughput_card(const std::vector<StepRecord>& steps, const Axis& time) {
  const auto rate = [](const StepRecord& step, std::int64_t tokens) {
    return step.latency_s() > 0 ? static_cast<double>(tokens) / step.latency_s() : 0.0;
  };
  const auto all =
      bin(steps, time.high, [&](const StepRecord& step) { return rate(step, step.tokens()); });
  const auto decode =
      bin(steps, time.high, [&](const StepRecord& step) { return rate(step, step.decode_tokens); });
  Plot plot("throughput", "Tokens per second over time",
            fmt::format("Lines: prefill and decode tokens together, peak {:.3g} per second; decode "
                        "tokens alone, peak {:.3g}.",
                        highest(all), highest(decode)),
            time, linear_axis("tokens / s", highest(all)));
  plot.line(all, 0);
  plot.line(decode, 1);
  return card("Throughput", "Query tokens computed per second of the replay's clock",
              {{0, "prefill + decode"}, {1, "decode"}}, plot.svg());
}

std::string occupancy_card(const std::vector<StepRecord>& steps, const Axis& time) {
  const auto full =
      bin(steps, time.high, [](const StepRecord& step) { return step.full_occupancy * 100; });
  const auto window =
      bin(steps, time.high, [](const StepRecord& step) { return step.window_occupancy * 100; });
  const double high = std::max(highest(full), highest(window));
  Plot plot("occupancy", "Cache occupancy over time",
            fmt::format("Lines: full-attention pool, peak {:.3g} %; window pool, peak {:.3g} %.",
                        highest(full), highest(window)),
            time, linear_axis("blocks in use, %", high));
  plot.line(full, 0);
  plot.line(window, 2);
  return card("Cache occupancy", "Share of each pool's blocks that requests hold",
              {{0, "full-attention layers"}, {2, "sliding-window layers"}}, plot.svg());
}

std::string table(const Cells& cells, bool with_header) {
  std::string out = with_header ? "<table class=\"numbers\">\n" : "<table>\n";
  for (std::size_t r = 0; r < cells.size(); ++r) {
    const bool header = with_header && r == 0;
    out += header ? "<thead><tr>" : "<tr>";
    for (std::size_t c = 0; c < cells[r].size(); ++c) {
      const char* tag = header || c == 0 ? "th" : "td";
      const char* scope = header ? " scope=\"col\"" : (c == 0 ? " scope=\"row\"" : "");
      out += fmt::format("<{0}{1}>{2}</{0}>", tag, scope, escape_html(cells[r][c]));
    }
    out += header ? "</tr></thead>\n<tbody>\n" : "</tr>\n";
  }
  return out + (with_header ? "</tbody>\n</table>\n" : "</table>\n");
}

std::string tile(const std::string& value, std::string_view name, bool bad = false) {
  return fmt::format("<div class=\"tile{}\"><b>{}</b><span>{}</span></div>\n", bad ? " bad" : "",
                     value, name);
}

std::string tiles(const ReplayResult& result, const Summary& summary) {
  const VerifyResult& verify = result.verify;
  std::string out =
      tile(fmt::format("{:.0f}", summary.tokens_per_s), "tokens / s, by step latency");
  const KindSummary& decode = summary.kinds[static_cast<std::size_t>(StepKind::kDecode)];
  const KindSummary& shown = decode.steps > 0 ? decode : summary.all;
  out += tile(fmt::format("{:.2f} ms", shown.p50_s * 1e3),
              decode.steps > 0 ? "median decode step" : "median step");
  out +=
      tile(fmt::format("{} / {}", result.requests_finished, result.requests), "requests finished");
  if (verify.rows_wrong > 0) {
    out += tile(fmt::format("{} of {}", verify.rows_wrong, verify.rows()), "verified rows wrong",
                true);
  } else {
    out += tile(fmt::format("{}", verify.rows()),
                verify.rows() > 0 ? "rows verified, all right" : "rows verified");
  }
  return "<div class=\"tiles\">\n" + out + "</div>\n";
}

}  // namespace

std::string html_report(const ReplayResult& result, const Summary& summary,
                        const ReportHeading& heading) {
  // The time axis ends with the last step, not at a round number: the bins cover it exactly.
  const Axis time{
      .label = "replay's clock, s", .low = 0.0, .high = std::max(summary.clock_s, 1e-9)};
  std::string body = fmt::format("<h1>diffkv replay</h1>\n<p>{}<br>{}</p>\n",
                                 escape_html(heading.trace), escape_html(heading.setup));
  body += tiles(result, summary);
  body += batch_card(result.steps, time);
  body += latency_card(result.steps, summary, time);
  body += throughput_card(result.steps, time);
  body += occupancy_card(result.steps, time);
  body +=
      fmt::format("<section>\n<h2>Steps</h2>\n{}</section>\n", table(step_table(summary), true));
  body += fmt::format("<section>\n<h2>Summary</h2>\n{}</section>\n",
                      table(overall_table(result, summary), false));
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>diffkv replay: {}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n{}</main>\n"
      "</body>\n</html>\n",
      escape_html(heading.trace), kStyle, body);
}

}  // namespace diffkv::replay
