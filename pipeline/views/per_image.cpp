// The operations of the augmentation policies on one image after another, in place.
//
// An image and its copy fit a core's cache, where whole batches do not. Results equal those of pipeline.views.colour and
// pipeline.views.geometry bit for bit, and so Pillow's: floats are multiplied and added in two roundings, which needs
// -ffp-contract=off. Nothing of the C++ library is used.
//
// Images are (3, H, W) uint8.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int LEVELS = 256;
constexpr int64_t NONE = -1;
constexpr int64_t PAD = 64;  // bytes in front of a copied channel; copying 50 KB to an odd address takes ten times as long

// In the order of operations.OPERATIONS.
enum Operation : int64_t {
    SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE,
    BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE, INVERT, SOLARIZE_ADD,
};

struct Image {
    uint8_t* pixels;
    int64_t height, width;

    int64_t size() const { return height * width; }
    uint8_t* channel(int number) const { return pixels + number * size(); }
};

// The room that operations work in.
struct Room {
    uint8_t* copy;  // 3 (H W + PAD), see keep
    int64_t* places;  // H + W
    int32_t* indices;  // W
    int16_t* sums;  // W + 2
};

// Levels of float32 are truncated and cut to [0, 255]; cutting whole numbers vectorises.
inline uint8_t level(float value) {
    int32_t whole = (int32_t)value;
    whole = whole < 0 ? 0 : whole;
    return (uint8_t)(whole > 255 ? 255 : whole);
}

inline float blend(float start, float end, float factor) { return (end - start) * factor + start; }

inline int32_t luminance(int32_t red, int32_t green, int32_t blue) {
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
}

// Replaces each level by its entry in a table, eight levels at a time.
void look_up(uint8_t* __restrict pixels, int64_t count, const uint8_t* __restrict table) {
    int64_t at = 0;
    for (; at + 8 <= count; at += 8) {
        uint64_t levels, made = 0;
        memcpy(&levels, pixels + at, 8);
        for (int byte = 0; byte < 64; byte += 8) made |= (uint64_t)table[levels >> byte & 0xff] << byte;
        memcpy(pixels + at, &made, 8);
    }
    for (; at < count; ++at) pixels[at] = table[pixels[at]];
}

// Replaces each level by what `replaced` makes of it.
template <typename Replaced>
void by_level(Image image, Replaced replaced) {
    uint8_t* pixels = image.pixels;
    int64_t count = 3 * image.size();
    for (int64_t at = 0; at < count; ++at) pixels[at] = replaced(pixels[at]);
}

void blend_with(Image image, float start, float factor) {
    by_level(image, [=](uint8_t value) { return level(blend(start, (float)value, factor)); });
}

void color(Image image, float factor) {
    uint8_t* __restrict red = image.channel(0);
    uint8_t* __restrict green = image.channel(1);
    uint8_t* __restrict blue = image.channel(2);
    int64_t size = image.size();
    for (int64_t at = 0; at < size; ++at) {
        float grey = (float)luminance(red[at], green[at], blue[at]);
        red[at] = level(blend(grey, (float)red[at], factor));
        green[at] = level(blend(grey, (float)green[at], factor));
        blue[at] = level(blend(grey, (float)blue[at], factor));
    }
}

void contrast(Image image, float factor) {
    const uint8_t *red = image.channel(0), *green = image.channel(1), *blue = image.channel(2);
    int64_t total = 0, size = image.size();
    for (int64_t row = 0; row < image.height; ++row) {
        int32_t of_row = 0;  // at most 2^16 pixels a side, of 2^8 levels
        for (int64_t at = row * image.width; at < (row + 1) * image.width; ++at)
            of_row += luminance(red[at], green[at], blue[at]);
        total += of_row;
    }
    blend_with(image, (float)((2 * total + size) / (2 * size)), factor);
}

// `middle` is a row within an image, `sums` has room for it and for a sum on either side. The first and the last pixel
// are computed too, and then kept: without them most rows would be no whole number of vectors.
void sharpen_row(uint8_t* __restrict made, const uint8_t* middle, int64_t width, float factor, int16_t* __restrict sums) {
    const uint8_t *above = middle - width, *below = middle + width;
    for (int64_t x = 0; x < width; ++x) sums[x] = (int16_t)(above[x] + middle[x] + below[x]);
    for (int64_t x = 0; x < width; ++x) {
        int16_t sum = (int16_t)(sums[x - 1] + sums[x] + sums[x + 1] + 4 * middle[x]);
        // Sums over 13 come no closer than 1/26 to a tie, so that rounding in float32 is exact.
        float smooth = (float)(int32_t)((float)sum * (1.0f / 13.0f) + 0.5f);
        made[x] = level(blend(smooth, (float)middle[x], factor));
    }
    made[0] = middle[0];
    made[width - 1] = middle[width - 1];
}

void sharpness(Image image, float factor, uint8_t* copy, int16_t* sums) {
    int64_t width = image.width;
    sums[0] = sums[width + 1] = 0;
    memcpy(copy, image.pixels, 3 * image.size());
    for (int number = 0; number < 3; ++number)
        for (int64_t y = 1; y < image.height - 1; ++y) {
            int64_t row = number * image.size() + y * width;
            sharpen_row(image.pixels + row, copy + row, width, factor, sums + 1);
        }
}

void autocontrast(Image image) {
    for (int number = 0; number < 3; ++number) {
        uint8_t *pixels = image.channel(number), lowest = 255, highest = 0, table[LEVELS];
        for (int64_t at = 0; at < image.size(); ++at) {
            lowest = pixels[at] < lowest ? pixels[at] : lowest;
            highest = pixels[at] > highest ? pixels[at] : highest;
        }
        if (lowest == highest) continue;
        double scale = 255.0 / (highest - lowest), offset = -(double)lowest * scale;
        for (int value = 0; value < LEVELS; ++value) {
            double stretched = value * scale + offset;
            stretched = stretched < 0.0 ? 0.0 : stretched;
            table[value] = (uint8_t)(stretched > 255.0 ? 255.0 : stretched);
        }
        look_up(pixels, image.size(), table);
    }
}

void equalize(Image image) {
    for (int number = 0; number < 3; ++number) {
        uint8_t *pixels = image.channel(number), table[LEVELS];
        // Four counts a level: equal levels beside each other would wait for one.
        uint32_t counts[4][LEVELS] = {};
        int64_t size = image.size(), at = 0;
        for (; at + 4 <= size; at += 4)
            for (int lane = 0; lane < 4; ++lane) ++counts[lane][pixels[at + lane]];
        for (; at < size; ++at) ++counts[0][pixels[at]];
        int64_t before[LEVELS + 1] = {}, highest = 0;
        for (int value = 0; value < LEVELS; ++value) {
            int64_t count = (int64_t)counts[0][value] + counts[1][value] + counts[2][value] + counts[3][value];
            before[value + 1] = before[value] + count;
            if (count) highest = value;
        }
        int64_t step = before[highest] / 255;
        if (step == 0) continue;
        for (int value = 0; value < LEVELS; ++value) {
            int64_t flat = (before[value] + step / 2) / step;
            table[value] = (uint8_t)(flat > 255 ? 255 : flat);
        }
        look_up(pixels, size, table);
    }
}

// Source coordinates along one axis of a matrix that does not mix the axes; Pillow adds the steps up one by one.
void accumulate(double place, double step, int64_t count, int64_t* places) {
    for (int64_t at = 0; at < count; ++at, place += step) places[at] = (int64_t)floor(place);
}

// Returns where a channel of the image is kept: a black pixel is at NONE.
uint8_t* kept(Image image, uint8_t* copy, int number) { return copy + number * (image.size() + PAD) + PAD; }

void keep(Image image, uint8_t* copy) {
    for (int number = 0; number < 3; ++number) {
        uint8_t* channel = kept(image, copy, number);
        channel[NONE] = 0;
        memcpy(channel, image.channel(number), image.size());
    }
}

// Makes row y of the kept pixels that `indices` say.
void gather_row(Image image, uint8_t* copy, int64_t y, const int32_t* __restrict indices) {
    int64_t width = image.width;
    for (int number = 0; number < 3; ++number) {
        const uint8_t* __restrict from = kept(image, copy, number);
        uint8_t* __restrict made = image.channel(number) + y * width;
        for (int64_t x = 0; x < width; ++x) made[x] = from[indices[x]];
    }
}

// Makes row y of a kept row, from `right` on; what lies outside is black.
void shift_row(Image image, uint8_t* copy, int64_t y, int64_t row, int64_t right) {
    int64_t width = image.width;
    int64_t first = right < 0 ? -right : 0, last = right > 0 ? width - right : width;
    if (row < 0 || row >= image.height || first >= last) first = last = 0;
    for (int number = 0; number < 3; ++number) {
        uint8_t* made = image.channel(number) + y * width;
        memset(made, 0, first);
        if (first < last) memcpy(made + first, kept(image, copy, number) + row * width + right + first, last - first);
        memset(made + last, 0, width - last);
    }
}

void move_along_axes(Image image, const double* matrix, const Room& room) {
    int64_t width = image.width, *columns = room.places, *rows = room.places + width;
    accumulate(matrix[2] + matrix[0] * 0.5, matrix[0], width, columns);
    accumulate(matrix[5] + matrix[4] * 0.5, matrix[4], image.height, rows);
    bool shifts = true;
    for (int64_t x = 0; x < width; ++x) shifts &= columns[x] - columns[0] == x;
    for (int64_t y = 0; y < image.height; ++y) {
        bool inside = rows[y] >= 0 && rows[y] < image.height;
        if (shifts || !inside) {
            shift_row(image, room.copy, y, inside ? rows[y] : NONE, columns[0]);
            continue;
        }
        for (int64_t x = 0; x < width; ++x) {
            bool found = columns[x] >= 0 && columns[x] < width;
            room.indices[x] = (int32_t)(found ? rows[y] * width + columns[x] : NONE);
        }
        gather_row(image, room.copy, y, room.indices);
    }
}

// By 16.16 fixed point, of Number int32_t or int64_t.
template <typename Number>
void move_freely(Image image, const int64_t* fixed, const Room& room) {
    Number width = (Number)image.width, height = (Number)image.height;
    Number a = (Number)fixed[0], b = (Number)fixed[1], c = (Number)fixed[2];
    Number d = (Number)fixed[3], e = (Number)fixed[4], f = (Number)fixed[5];
    bool shifts = a == 65536 && d == 0;
    for (Number y = 0; y < height; ++y) {
        Number first_column = y * b + c, first_row = y * e + f;
        if (shifts) {
            shift_row(image, room.copy, y, first_row >> 16, first_column >> 16);
            continue;
        }
        for (Number x = 0; x < width; ++x) {
            Number column = (x * a + first_column) >> 16, row = (x * d + first_row) >> 16;
            bool inside = (column >= 0) & (column < width) & (row >= 0) & (row < height);
            room.indices[x] = (int32_t)(inside ? row * width + column : NONE);
        }
        gather_row(image, room.copy, y, room.indices);
    }
}

// By Pillow's matrix, see pipeline.views.geometry.
void move(Image image, const double* matrix, const Room& room) {
    keep(image, room.copy);
    if (matrix[1] == 0.0 && matrix[3] == 0.0) return move_along_axes(image, matrix, room);
    double a = matrix[0], b = matrix[1], d = matrix[3], e = matrix[4];
    double shifted[6] = {a, b, matrix[2] + a * 0.5 + b * 0.5, d, e, matrix[5] + d * 0.5 + e * 0.5};
    int64_t fixed[6], largest = 0;
    for (int at = 0; at < 6; ++at) {
        fixed[at] = (int64_t)floor(shifted[at] * 65536.0 + 0.5);
        largest = llabs(fixed[at]) > largest ? llabs(fixed[at]) : largest;
    }
    // Half the width is faster, and enough for all but extreme scales.
    if (largest <= INT32_MAX / (image.height + image.width + 1))
        move_freely<int32_t>(image, fixed, room);
    else
        move_freely<int64_t>(image, fixed, room);
}

void reverse(uint8_t* __restrict pixels, int64_t count, uint8_t* __restrict copy) {
    memcpy(copy, pixels, count);
    for (int64_t at = 0; at < count; ++at) pixels[at] = copy[count - 1 - at];
}

// Moves the frame down and right over the image, black outside, then flips it left-right where asked.
void crop_flip(Image image, int64_t down, int64_t right, bool flipped, uint8_t* copy) {
    if (down != 0 || right != 0) {
        keep(image, copy);
        for (int64_t y = 0; y < image.height; ++y) shift_row(image, copy, y, y + down, right);
    }
    for (int64_t row = 0; flipped && row < 3 * image.height; ++row)
        reverse(image.pixels + row * image.width, image.width, copy);
}

void apply(Image image, int64_t operation, double magnitude, const double* matrix, const Room& room) {
    float factor = (float)(1.0 + magnitude);
    int whole = (int)magnitude;
    uint8_t mask, lowest;
    switch (operation) {
        case SHEAR_X: case SHEAR_Y: case TRANSLATE_X: case TRANSLATE_Y: case ROTATE:
            return move(image, matrix, room);
        case BRIGHTNESS:
            return blend_with(image, 0.0f, factor);
        case COLOR:
            return color(image, factor);
        case CONTRAST:
            return contrast(image, factor);
        case SHARPNESS:
            return sharpness(image, factor, room.copy, room.sums);
        case POSTERIZE:
            mask = (uint8_t)(256 - (1 << (8 - whole)));
            return by_level(image, [=](uint8_t value) { return (uint8_t)(value & mask); });
        case SOLARIZE:
            lowest = (uint8_t)ceil(magnitude);
            return by_level(image, [=](uint8_t value) { return (uint8_t)(value >= lowest ? 255 - value : value); });
        case AUTOCONTRAST:
            return autocontrast(image);
        case EQUALIZE:
            return equalize(image);
        case INVERT:
            return by_level(image, [](uint8_t value) { return (uint8_t)(255 - value); });
        case SOLARIZE_ADD:
            return by_level(image, [=](uint8_t value) { return (uint8_t)(value < 128 ? value + whole : value); });
    }
}

}  // namespace

// Applies to each image the operations chosen for it, in order.
//
//   images      (count, 3, height, width)
//   rows        (count, places): rows of the table, or -1 for none
//   operations  (rows of the table,): see Operation; those that move pixels come first
//   magnitudes  the same, in the units of operations.magnitude
//   matrices    (rows that move pixels, 6)
//
// Returns 0, or 1 where there is no memory.
extern "C" int apply_operations(
    uint8_t* images, int64_t count, int64_t height, int64_t width, const int64_t* rows, int64_t places,
    const int64_t* operations, const double* magnitudes, const double* matrices) {
    int64_t size = height * width;
    Room room = {
        (uint8_t*)malloc(3 * (size + PAD)),
        (int64_t*)malloc((height + width) * sizeof(int64_t)),
        (int32_t*)malloc(width * sizeof(int32_t)),
        (int16_t*)malloc((width + 2) * sizeof(int16_t)),
    };
    bool fits = room.copy && room.places && room.indices && room.sums;
    for (int64_t at = 0; fits && at < count * places; ++at)
        if (rows[at] != NONE) {
            Image image = {images + at / places * 3 * size, height, width};
            int64_t row = rows[at], operation = operations[row];
            apply(image, operation, magnitudes[row], operation <= ROTATE ? matrices + 6 * row : nullptr, room);
        }
    free(room.copy);
    free(room.places);
    free(room.indices);
    free(room.sums);
    return !fits;
}

// Crops and flips each image in place.
//
//   images   (count, 3, height, width)
//   offsets  (count, 2): how far the frame moves down and right
//   flipped  (count,)
//
// Returns as apply_operations.
extern "C" int crop_flip_images(
    uint8_t* images, int64_t count, int64_t height, int64_t width, const int64_t* offsets, const uint8_t* flipped) {
    int64_t size = height * width;
    uint8_t* copy = (uint8_t*)malloc(3 * (size + PAD));
    for (int64_t at = 0; copy && at < count; ++at)
        crop_flip({images + at * 3 * size, height, width}, offsets[2 * at], offsets[2 * at + 1], flipped[at], copy);
    free(copy);
    return !copy;
}

// Writes images (count, height, width, 3) to `made`, (count, 3, height, width). Returns 0.
extern "C" int channels_first(
    uint8_t* __restrict made, int64_t count, int64_t height, int64_t width, const uint8_t* __restrict images) {
    int64_t size = height * width;
    for (int64_t at = 0; at < count; ++at, images += 3 * size, made += 3 * size)
        for (int64_t pixel = 0; pixel < size; ++pixel)
            for (int number = 0; number < 3; ++number) made[number * size + pixel] = images[3 * pixel + number];
    return 0;
}
