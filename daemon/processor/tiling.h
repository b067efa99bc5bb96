/*
 * Which grid a picture is cut into. Pure arithmetic of GotOcr2ImageProcessor
 * (get_optimal_tiled_canvas), in double as Python has it.
 */
#ifndef INTERNVLD_PROCESSOR_TILING_H
#define INTERNVLD_PROCESSOR_TILING_H

/* The grid of min … max tiles whose aspect ratio is nearest to width / height; of equally near ones
 * the last whose area is less than twice the picture's. 1 x 1 when min > max. Sizes in pixels, all
 * positive. */
void tiling_choose(int width, int height, int tile_width, int tile_height, int min_tiles,
                   int max_tiles, int *n_columns, int *n_rows);
/* Tiles of a grid: a thumbnail follows when there is more than one. */
int tiling_n_tiles(int n_columns, int n_rows, int use_thumbnail);

#endif
