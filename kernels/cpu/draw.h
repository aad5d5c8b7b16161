// From weights to a token.
#ifndef DSPARK_DRAW_H
#define DSPARK_DRAW_H

#include "common.h"

// Inverse CDF over weights[0..columns): the column whose cell holds `at` in [0, 1). One of weight 0 is never drawn.
// Cells are found in two stages, so that sums of many small weights keep their precision; `cells` is scratch of
// columns / 256 + 1 doubles. Weights are padded with zeros to a multiple of LANES.
static inline long draw_column(const float *weights, long columns, double at, double *cells) {
  enum { CELL = 256 };
  double total = 0;
  long count = (columns + CELL - 1) / CELL;
  for (long c = 0; c < count; c++) {
    floats sum = {0};
    for (long j = c * CELL; j < smaller((c + 1) * CELL, round_up(columns, LANES)); j += LANES) sum += load(weights + j);
    total += cells[c] = sum_lanes(sum);
  }
  double point = at * total, last_below = nextafter(total, 0), before = 0;
  point = point < last_below ? point : last_below;
  long cell = 0;
  while (cell < count - 1 && before + cells[cell] <= point) before += cells[cell++];
  long end = smaller((cell + 1) * CELL, columns), choice = -1;
  for (long j = cell * CELL; j < end; j++) {
    if (weights[j] <= 0) continue;
    choice = j;  // rounding may leave the point behind the last edge: that is its column then
    before += weights[j];
    if (before > point) return j;
  }
  for (long j = cell * CELL - 1; choice < 0 && j >= 0; j--)
    if (weights[j] > 0) choice = j;
  return choice < 0 ? 0 : choice;
}

#endif
