/*
 * The choice of a grid. See tiling.h.
 */
#include "daemon/processor/tiling.h"

#include <math.h>

void tiling_choose(int width, int height, int tile_width, int tile_height, int min_tiles,
                   int max_tiles, int *n_columns, int *n_rows)
{
    double ratio = (double)width / height, best = INFINITY;
    double area = (double)width * height;

    *n_columns = *n_rows = 1;
    /* the reference sorts (columns, rows) stably by their product: number of tiles, then columns */
    for (int n = min_tiles > 1 ? min_tiles : 1; n <= max_tiles; n++) {
        for (int c = 1; c <= n; c++) {
            if (n % c)
                continue;
            int r = n / c;
            double difference = fabs(ratio - (double)c / r);

            if (difference < best ||
                (difference == best && area > 0.5 * tile_height * tile_width * c * r)) {
                best = difference;
                *n_columns = c;
                *n_rows = r;
            }
        }
    }
}

int tiling_n_tiles(int n_columns, int n_rows, int use_thumbnail)
{
    int n = n_columns * n_rows;

    return n > 1 && use_thumbnail ? n + 1 : n;
}
