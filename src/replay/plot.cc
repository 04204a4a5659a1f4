#include "replay/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace diffkv::replay {
namespace {

// Of the viewBox; the page scales it.
constexpr double kWidth = 760;
constexpr double kHeight = 260;
constexpr double kLeft = 66;
constexpr double kRight = 748;
constexpr double kTop = 12;
constexpr double kBottom = 214;

// The distance of ticks: 1, 2 or 5 times a power of ten, about five of them.
double tick_step(double range) {
  const double raw = std::max(range, 1e-300) / 5.0;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (raw <= factor * power * 1.0001) return factor * power;
  }
  return 10.0 * power;
}

std::vector<double> ticks(const Axis& axis) {
  std::vector<double> values;
  if (axis.logarithmic) {
    const auto first = static_cast<int>(std::lround(std::log10(axis.low)));
    const auto last = static_cast<int>(std::lround(std::log10(axis.high)));
    for (int i = first; i <= last; ++i) values.push_back(std::pow(10.0, i));
    return values;
  }
  const double step = tick_step(axis.high - axis.low);
  const auto count = static_cast<int>(std::floor((axis.high - axis.low) / step * 1.0001));
  for (int i = 0; i <= count; ++i) values.push_back(axis.low + i * step);
  return values;
}

std::string tick_label(double value) {
  if (value >= 1e9) return fmt::format("{:.3g}G", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.3g}M", value / 1e6);
  if (value >= 1e4) return fmt::format("{:.3g}k", value / 1e3);
  return fmt::format("{:.4g}", value);
}

// The place of a value between the axis' ends, 0 to 1.
double share(const Axis& axis, double value) {
  const double low = axis.logarithmic ? std::log10(axis.low) : axis.low;
  const double high = axis.logarithmic ? std::log10(axis.high) : axis.high;
  const double at = axis.logarithmic ? std::log10(std::max(value, axis.low)) : value;
  return std::clamp((at - low) / (high - low), 0.0, 1.0);
}

}  // namespace

Axis linear_axis(std::string label, double high) {
  Axis axis{.label = std::move(label)};
  if (high > 0 && std::isfinite(high)) {
    const double step = tick_step(high);
    axis.high = std::ceil(high / step * 0.9999) * step;
  }
  return axis;
}

Axis log_axis(std::string label, const std::vector<double>& values) {
  double low = 0.0;
  double high = 0.0;
  for (const double value : values) {
    if (!(value > 0)) continue;
    low = low > 0 ? std::min(low, value) : value;
    high = std::max(high, value);
  }
  Axis axis{.label = std::move(label), .low = 1.0, .high = 10.0, .logarithmic = true};
  if (low > 0) {
    axis.low = std::pow(10.0, std::floor(std::log10(low)));
    axis.high = std::max(std::pow(10.0, std::ceil(std::log10(high))), axis.low * 10.0);
  }
  return axis;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) out += c;
    }
  }
  return out;
}

Plot::Plot(std::string id, std::string title, std::string description, Axis x, Axis y)
    : id_(std::move(id)),
      title_(std::move(title)),
      description_(std::move(description)),
      x_(std::move(x)),
      y_(std::move(y)) {}

double Plot::to_x(double x) const { return kLeft + share(x_, x) * (kRight - kLeft); }
double Plot::to_y(double y) const { return kBottom - share(y_, y) * (kBottom - kTop); }

std::string Plot::path(const std::vector<Point>& points) const {
  std::string out;
  for (const Point& point : points) {
    out += fmt::format("{}{:.1f} {:.1f}", out.empty() ? "" : "L", to_x(point.x), to_y(point.y));
  }
  return out;
}

void Plot::area(const std::vector<Point>& lower, const std::vector<Point>& upper, int series) {
  if (upper.empty()) return;
  const std::vector<Point> back(lower.rbegin(), lower.rend());
  marks_ +=
      fmt::format("<path class=\"area s{}\" d=\"M{}L{}Z\"/>\n", series, path(upper), path(back));
}

void Plot::line(const std::vector<Point>& points, int series) {
  if (points.empty()) return;
  marks_ += fmt::format("<path class=\"line s{}\" d=\"M{}\"/>\n", series, path(points));
}

void Plot::dots(const std::vector<Point>& points, int series) {
  if (points.empty()) return;
  // One path of zero-length strokes with round caps: a tenth of the bytes of circles.
  std::string data;
  for (const Point& point : points) {
    data += fmt::format("M{:.1f} {:.1f}h0", to_x(point.x), to_y(point.y));
  }
  marks_ += fmt::format("<path class=\"dots s{}\" d=\"{}\"/>\n", series, data);
}

std::string Plot::axes() const {
  std::string out;
  for (const double value : ticks(y_)) {
    const double y = to_y(value);
    out += fmt::format(
        "<path class=\"grid\" d=\"M{} {:.1f}H{}\"/>"
        "<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
        kLeft, y, kRight, kLeft - 8, y + 4, tick_label(value));
  }
  for (const double value : ticks(x_)) {
    const double x = to_x(value);
    out += fmt::format(
        "<path class=\"axis\" d=\"M{:.1f} {}v5\"/>"
        "<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
        x, kBottom, x, kBottom + 20, tick_label(value));
  }
  out += fmt::format("<path class=\"axis\" d=\"M{} {}H{}\"/>\n", kLeft, kBottom, kRight);
  out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                     (kLeft + kRight) / 2, kHeight - 6, escape_html(x_.label));
  out += fmt::format(
      "<text x=\"14\" y=\"{0}\" text-anchor=\"middle\" transform=\"rotate(-90 14 {0})\">{1}"
      "</text>\n",
      (kTop + kBottom) / 2, escape_html(y_.label));
  return out;
}

std::string Plot::svg() const {
  return fmt::format(
      "<svg viewBox=\"0 0 {0} {1}\" role=\"img\" aria-labelledby=\"{2}-title {2}-desc\">\n"
      "<title id=\"{2}-title\">{3}</title>\n<desc id=\"{2}-desc\">{4}</desc>\n{5}{6}</svg>\n",
      kWidth, kHeight, escape_html(id_), escape_html(title_), escape_html(description_), axes(),
      marks_);
}

}  // namespace diffkv::replay
