/* XXH3-128 of each leaf of an image, on a GPU: eight threads a leaf, one for each lane of XXH3's accumulator.
 *
 * After xxHash's specification, for inputs of more than 240 bytes, without a seed. Every leaf but the last is
 * LEAF_BYTES long; the last is a multiple of 64 bytes and longer than 240, as the end of a flat image is. The tables of
 * the secret's words come from source.py. It is C that a CPU's compiler takes too: so it is tested without a GPU.
 */

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define UNROLL _Pragma("unroll")
#define HIGH(a, b) __umul64hi(a, b)
#define ALIGNED __align__(16)
#else
#define KERNEL void
#define UNROLL
#define HIGH(a, b) ((word)(((unsigned __int128)(a) * (b)) >> 64))
#define ALIGNED __attribute__((aligned(16)))
#endif

typedef unsigned long long word;
typedef unsigned int half;
typedef struct ALIGNED { word even, odd; } pair;

#define STRIPE 64
#define STRIPES 16
#define BLOCK (STRIPE * STRIPES)

static TABLE word start_of[8] = START;
static TABLE word secret_of[24] = SECRET;
static TABLE word last_of[8] = LAST;
static TABLE word low_of[8] = LOW;
static TABLE word high_of[8] = HIGH_OF;

static DEVICE word mixed(word sum, word own, word neighbour, word secret)
{
    word keyed = own ^ secret;
    return sum + neighbour + (word)(half)keyed * (half)(keyed >> 32);
}

/* One lane over one leaf. The neighbour's word is in the same pair, so that one load of 16 bytes brings both. */
static DEVICE word lane_of(const pair *leaf, word length, int lane)
{
    word sum = start_of[lane], keys[STRIPES];
    const int at = lane >> 1, odd = lane & 1;
    word blocks = (length - 1) / BLOCK, block;
    int stripe, left;
    pair both;

    /* In registers: threads that ask constant memory for different words wait for each other. */
    UNROLL
    for (stripe = 0; stripe < STRIPES; stripe++)
        keys[stripe] = secret_of[stripe + lane];
    for (block = 0; block < blocks; block++) {
        UNROLL
        for (stripe = 0; stripe < STRIPES; stripe++) {
            both = leaf[block * (BLOCK / 16) + stripe * (STRIPE / 16) + at];
            sum = mixed(sum, odd ? both.odd : both.even, odd ? both.even : both.odd, keys[stripe]);
        }
        sum = (sum ^ (sum >> 47) ^ secret_of[STRIPES + lane]) * 0x9E3779B1ULL;
    }
    left = (int)((length - 1 - blocks * BLOCK) / STRIPE);
    UNROLL
    for (stripe = 0; stripe < STRIPES - 1; stripe++) {
        if (stripe < left) {
            both = leaf[blocks * (BLOCK / 16) + stripe * (STRIPE / 16) + at];
            sum = mixed(sum, odd ? both.odd : both.even, odd ? both.even : both.odd, keys[stripe]);
        }
    }
    both = leaf[(length - STRIPE) / 16 + at];
    return mixed(sum, odd ? both.odd : both.even, odd ? both.even : both.odd, last_of[lane]);
}

static DEVICE word merged(const word *sums, const word *secret, word value)
{
    int i;
    for (i = 0; i < 8; i += 2) {
        word a = sums[i] ^ secret[i], b = sums[i + 1] ^ secret[i + 1];
        value += (a * b) ^ HIGH(a, b);
    }
    value = (value ^ (value >> 37)) * 0x165667919E3779F9ULL;
    return value ^ (value >> 32);
}

/* sums: eight words a leaf, for leaves [first, first + count) of an image of nbytes bytes. */
KERNEL lanes(const pair *image, word nbytes, word first, word count, word *sums)
{
    word index = (word)blockIdx.x * blockDim.x + threadIdx.x, leaf = first + index / 8;
    word begin = leaf * LEAF_BYTES;
    if (index / 8 < count && begin < nbytes) {
        word length = nbytes - begin < LEAF_BYTES ? nbytes - begin : LEAF_BYTES;
        sums[leaf * 8 + index % 8] = lane_of(image + begin / 16, length, (int)(index % 8));
    }
}

/* digests: two words a leaf, the low one first; for all leaves of an image. */
KERNEL digests(const word *sums, word nbytes, word count, word *digests_of)
{
    word leaf = (word)blockIdx.x * blockDim.x + threadIdx.x, begin = leaf * LEAF_BYTES;
    if (leaf < count && begin < nbytes) {
        word length = nbytes - begin < LEAF_BYTES ? nbytes - begin : LEAF_BYTES;
        digests_of[leaf * 2] = merged(sums + leaf * 8, low_of, length * 0x9E3779B185EBCA87ULL);
        digests_of[leaf * 2 + 1] = merged(sums + leaf * 8, high_of, ~(length * 0xC2B2AE3D27D4EB4FULL));
    }
}
