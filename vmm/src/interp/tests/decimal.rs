//! The decimal adjustments, against arithmetic on the digits.

use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::eflags::{AF, CF, PF, SF, ZF};

/// AX and the flags after `bytes` with AX and CF/AF given.
fn adjust(bytes: &[u8], ax: u32, flags: u32) -> (u32, u32) {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[0] = 0x5555_0000 | ax;
    machine.cpu.eflags |= flags;
    machine.done(bytes);
    assert_eq!(machine.cpu.gpr[0] >> 16, 0x5555);
    (machine.cpu.gpr[0] & 0xffff, machine.cpu.eflags & (AF | CF | PF | SF | ZF))
}

fn bcd(n: u32) -> u32 {
    n / 10 % 10 * 16 + n % 10
}

#[test]
fn daa_and_das_keep_packed_digits_right() {
    for a in 0..100 {
        for b in 0..100 {
            let (x, y) = (bcd(a), bcd(b));
            let half = |carry: bool| if carry { AF } else { 0 };
            let sum = x + y;
            let flags = half((x & 15) + (y & 15) > 15) | if sum > 0xff { CF } else { 0 };
            let (ax, after) = adjust(&[0x27], sum & 0xff, flags);
            assert_eq!((ax, after & CF != 0), (bcd(a + b), a + b > 99), "{a} + {b}");
            let difference = x.wrapping_sub(y) & 0xff;
            let flags = half(x & 15 < y & 15) | if x < y { CF } else { 0 };
            let (ax, after) = adjust(&[0x2f], difference, flags);
            assert_eq!((ax, after & CF != 0), (bcd(100 + a - b), a < b), "{a} - {b}");
        }
    }
}

#[test]
fn aaa_and_aas_carry_into_ah() {
    for a in 0..10 {
        for b in 0..10 {
            let (sum, half) = (a + b, if a + b > 15 { AF } else { 0 });
            let (ax, flags) = adjust(&[0x37], 0x0500 | sum, half);
            assert_eq!(ax, if sum > 9 { 0x0600 | (sum - 10) } else { 0x0500 | sum }, "{a} + {b}");
            assert_eq!(flags & (CF | AF) != 0, sum > 9);
            let difference = a.wrapping_sub(b) & 0xff;
            let half = if a < b { AF } else { 0 };
            let (ax, flags) = adjust(&[0x3f], 0x0500 | difference, half);
            let borrowed = a < b;
            let digit = if borrowed { 10 + a - b } else { a - b };
            // The low byte borrowed already: AX - 6 takes one from AH only if AL is below 6.
            assert_eq!((ax & 0xff, flags & CF != 0), (digit, borrowed), "{a} - {b}");
        }
    }
}

#[test]
fn aam_and_aad_are_division_and_multiplication() {
    for al in 0..=255 {
        let (ax, flags) = adjust(&[0xd4, 10], 0x7700 | al, 0);
        assert_eq!(ax, (al / 10) << 8 | (al % 10));
        assert_eq!(flags & ZF != 0, al % 10 == 0);
    }
    for (ah, al) in [(0, 0), (9, 9), (25, 6), (255, 255)] {
        let (ax, flags) = adjust(&[0xd5, 10], ah << 8 | al, 0);
        assert_eq!(ax, (ah * 10 + al) & 0xff);
        assert_eq!(flags & SF != 0, ax & 0x80 != 0);
    }
    let mut machine = Machine::kernel();
    assert_eq!(machine.run(&[0xd4, 0]), Step::Exception(Exception::DE));
}
