/* Intel's AMX: registers of 16 rows of 64 bytes, called tiles, and an instruction that adds the product of two of them, in
   int8, to a third one of 16 x 16 sums in int32. The left factor has a row for each row of the sums; the right one has a column
   of words for each of their columns, which is the order of a vector of x in int8.h. */
#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

enum { AMX_ROWS = 16, AMX_BYTES = 64 };

/* A process may use tiles once Linux has allowed it, because the system then saves 8 KB more of a thread that it interrupts. */
static int are_tiles_allowed;
static void ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    are_tiles_allowed = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
static int may_use_tiles(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_for_tiles);
    return are_tiles_allowed;
}

/* A thread sets the size of its eight tiles before it uses them and gives them up afterwards, as oneDNN does too. */
static void begin_tiles(void) {
    struct __attribute__((packed, aligned(64))) {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {.palette = 1};
    for (int i = 0; i < 8; i++) sizes.bytes[i] = AMX_BYTES, sizes.rows[i] = AMX_ROWS;
    _tile_loadconfig(&sizes);
}
static void end_tiles(void) { _tile_release(); }
#else
#define HAS_AMX 0
static int may_use_tiles(void) { return 0; }
static void begin_tiles(void) {}
static void end_tiles(void) {}
#endif
