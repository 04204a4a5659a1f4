// Small plots as inline SVG.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace diffkv::replay {

struct Axis {
  std::string label;  // with its unit
  double low = 0.0;
  double high = 1.0;
  bool logarithmic = false;  // low and high are then positive
};

struct Point {
  double x = 0.0;
  double y = 0.0;
};

// An axis from 0 to a round number at or above `high`.
Axis linear_axis(std::string label, double high);
// An axis of whole decades around the positive ones of `values`.
Axis log_axis(std::string label, const std::vector<double>& values);

// `text` with <, >, & and " as entities and control characters left out.
std::string escape_html(std::string_view text);

// Axes, grid and marks; marks are drawn in the order of the calls and coloured by the CSS variable
// --series-N. Points outside the axes are moved to their edge.
class Plot {
 public:
  // `title` and `description` are what a screen reader reads; `id` is unique in the page.
  Plot(std::string id, std::string title, std::string description, Axis x, Axis y);

  // Between two curves with the same x.
  void area(const std::vector<Point>& lower, const std::vector<Point>& upper, int series);
  void line(const std::vector<Point>& points, int series);
  void dots(const std::vector<Point>& points, int series);

  std::string svg() const;

 private:
  double to_x(double x) const;
  double to_y(double y) const;
  std::string path(const std::vector<Point>& points) const;
  std::string axes() const;

  std::string id_;
  std::string title_;
  std::string description_;
  Axis x_;
  Axis y_;
  std::string marks_;
};

}  // namespace diffkv::replay
