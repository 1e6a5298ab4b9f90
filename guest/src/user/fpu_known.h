/* Where the recurrences of fpu_loop.S end. Worked out in integers by guest/tests/fpu.rs, which compares. */
#define FPU_STEPS 2048

/* For each way: control word, MXCSR; x87 x, y, w; lanes of xmm.x, y, w; lanes of xmm.s. */
#define FPU_KNOWN \
    {0x37f, 0x1f80, \
     {{0xdc203c0c8e756d99, 0x3ffe, {0}}, {0x95591bd24873c665, 0x3ffe, {0}}, {0xb9b33ea36ecfd05a, 0x3fff, {0}}}, \
     {{0x3fe6e10da183b9df, 0x3fdb310697062e27}, {0x3fe182603cf81141, 0x3fe08c331408d92c}, {0x3ff77af784db4c99, 0x3ff7ea37f28dd1ff}}, \
     {0x3e30021b, 0x3f444977, 0x3f3cf1a8, 0x3f6756fe}}, \
    {0x67f, 0x3f80, \
     {{0xf5ec512419435000, 0x3ffe, {0}}, {0x88aec7786fa03000, 0x3ffe, {0}}, {0xb848f62cffdaa800, 0x3fff, {0}}}, \
     {{0x3feebd8a2483286a, 0x3fcb9577765d51dd}, {0x3fe115d8ef0df406, 0x3ff1c2cf1a006a46}, {0x3ff7091ec59ffb55, 0x3ff9bbe34371379a}}, \
     {0x3f520a91, 0x3f08dd60, 0x3f56889b, 0x3f76d895}}, \
    {0xb7f, 0x5f80, \
     {{0xb48f14f4fda0cf05, 0x3ffc, {0}}, {0x9b50a2397aceb260, 0x3fff, {0}}, {0xd177f8d3c99c3272, 0x3fff, {0}}}, \
     {{0x3fc7e9804a7d7c02, 0x3feec2e77a0e96c5}, {0x3ff79555d897852e, 0x3fe5a0a5bd79e06c}, {0x3ffb54617b68222e, 0x3ff78e35ec9ea1a3}}, \
     {0x3ed74375, 0x3f17a49a, 0x3e0a45e4, 0x3f50deb0}}, \
    {0xc7f, 0x7f80, \
     {{0xd20a910000000000, 0x3ffe, {0}}, {0xb987090000000000, 0x3ffe, {0}}, {0xbda3b70000000000, 0x3fff, {0}}}, \
     {{0x3feebd8a2483286a, 0x3fcb9577765d51dd}, {0x3fe115d8ef0df406, 0x3ff1c2cf1a006a46}, {0x3ff7091ec59ffb55, 0x3ff9bbe34371379a}}, \
     {0x3f520a91, 0x3f08dd60, 0x3f56889b, 0x3f76d895}}
