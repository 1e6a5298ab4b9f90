//! Fetching at the edges, and what is no instruction.

use super::super::flat::Page;
use super::super::{Exception, Step};
use super::machine::*;
use crate::cpu::Seg;

#[test]
fn instruction_on_two_pages_faults_on_the_second() {
    let mut machine = Machine::kernel();
    machine.cpu.eip = 0x5ffe;
    machine.bus.pages.insert(6, Page::Absent);
    let fault = machine.fault(&[0xb8, 1, 2, 3, 4]);
    assert_eq!((fault.vector, fault.cr2), (14, Some(0x6000)));
    machine.bus.pages.clear();
    machine.done(&[0xb8, 1, 2, 3, 4]);
    assert_eq!((machine.cpu.gpr[0], machine.cpu.eip), (0x0403_0201, 0x6003));
}

#[test]
fn page_behind_a_whole_instruction_does_not_matter() {
    let mut machine = Machine::kernel();
    machine.cpu.eip = 0x5fff;
    machine.bus.pages.insert(6, Page::Absent);
    machine.done(&[0x90]);
    let fault = machine.fault(&[]);
    assert_eq!(fault.cr2, Some(0x6000));
}

#[test]
fn code_beyond_the_limit_is_gp() {
    let mut machine = Machine::kernel();
    machine.cpu.seg[Seg::Cs as usize].limit = CODE + 1;
    machine.done(&[0xb0, 7]);
    assert_eq!(machine.fault(&[]), Exception::gp(0));
    machine.cpu.eip = CODE;
    assert_eq!(machine.fault(&[0xb8, 0, 0, 0, 0]), Exception::gp(0), "half inside");
}

#[test]
fn fifteen_bytes_are_an_instruction_and_sixteen_are_gp() {
    let mut bytes = vec![0x66; 14];
    bytes.push(0x90);
    Machine::kernel().done(&bytes);
    bytes.insert(0, 0x66);
    assert_eq!(Machine::kernel().fault(&bytes), Exception::gp(0));
}

#[test]
fn what_is_no_instruction_is_ud() {
    for bytes in [
        &[0x0f, 0x0b][..],          // ud2
        &[0x0f, 0xff, 0xc0],        // ud0
        &[0x0f, 0xb9, 0xc0],        // ud1
        &[0x0f, 0x0a],              // nothing
        &[0x0f, 0xaa],              // rsm
        &[0x0f, 0x05],              // syscall
        &[0x0f, 0x34],              // sysenter
        &[0x0f, 0xc7, 0xf0],        // rdrand
        &[0x0f, 0x01, 0xd0],        // xgetbv
        &[0x0f, 0x01, 0xc1],        // vmcall
        &[0x0f, 0x01, 0xd9],        // vmmcall
        &[0x0f, 0x01, 0xf8],        // swapgs, in long mode
        &[0xf3, 0x0f, 0xb8, 0xc0],  // popcnt
        &[0x0f, 0x38, 0xf0, 0x00],  // movbe
        &[0xc5, 0xf8, 0x77],        // vzeroupper
        &[0x0f, 0x22, 0xc8],        // mov cr1, eax
        &[0x62, 0xc0],              // bound of a register
        &[0x8d, 0xc0],              // lea of a register
        &[0xfe, 0xd0],              // group 4, /2
        &[0x0f, 0x01, 0x38 | 0xc0], // invlpg of a register
    ] {
        assert_eq!(Machine::kernel().fault(bytes), Exception::UD, "{bytes:02x?}");
    }
}

#[test]
fn lock_is_refused_where_it_means_nothing() {
    for bytes in [
        &[0xf0, 0x90][..],                        // nop
        &[0xf0, 0x01, 0xc0],                      // add to a register
        &[0xf0, 0x03, 0x05, 0, 0x60, 0, 0],       // add from memory
        &[0xf0, 0x39, 0x05, 0, 0x60, 0, 0],       // cmp
        &[0xf0, 0x89, 0x05, 0, 0x60, 0, 0],       // mov
        &[0xf0, 0x0f, 0xa3, 0x05, 0, 0x60, 0, 0], // bt
        &[0xf0, 0xff, 0x35, 0, 0x60, 0, 0],       // push
        &[0xf0, 0xd1, 0x05, 0, 0x60, 0, 0],       // rol
        &[0xf0, 0xf4],                            // hlt
        &[0xf0, 0xcf],                            // iret
        &[0xf0, 0x0f, 0x22, 0xc0],                // mov cr0 (AMD's CR8)
    ] {
        assert_eq!(Machine::kernel().fault(bytes), Exception::UD, "{bytes:02x?}");
    }
}

#[test]
fn lock_is_accepted_on_memory() {
    for bytes in [
        &[0xf0, 0x01, 0x05, 0, 0x60, 0, 0][..],
        &[0xf0, 0xff, 0x05, 0, 0x60, 0, 0],
        &[0xf0, 0xf7, 0x1d, 0, 0x60, 0, 0],
        &[0xf0, 0x87, 0x05, 0, 0x60, 0, 0],
        &[0xf0, 0x0f, 0xc1, 0x05, 0, 0x60, 0, 0],
        &[0xf0, 0x0f, 0xb1, 0x0d, 0, 0x60, 0, 0],
        &[0xf0, 0x0f, 0xc7, 0x0d, 0, 0x60, 0, 0],
        &[0xf0, 0x0f, 0xba, 0x2d, 0, 0x60, 0, 0, 3],
    ] {
        Machine::kernel().done(bytes);
    }
}

#[test]
fn hints_are_nothing() {
    for bytes in [
        &[0x90][..],
        &[0xf3, 0x90],                   // pause
        &[0x0f, 0x1f, 0x44, 0x00, 0x00], // nop [eax + eax]
        &[0xf3, 0x0f, 0x1e, 0xfb],       // endbr32
        &[0xf3, 0x0f, 0x1e, 0xc8],       // rdsspd eax
        &[0x0f, 0x18, 0x00],             // prefetchnta
        &[0x0f, 0x0d, 0x08],             // prefetchw
        &[0x0f, 0xae, 0xe8],             // lfence
        &[0x0f, 0xae, 0xf0],             // mfence
        &[0x0f, 0xae, 0xf8],             // sfence
    ] {
        let mut machine = Machine::kernel();
        machine.cpu.gpr[0] = 0xffff_0000;
        let before = machine.cpu.gpr;
        machine.done(bytes);
        assert_eq!((machine.cpu.gpr, machine.cpu.eip), (before, CODE + bytes.len() as u32));
    }
}

#[test]
fn tzcnt_and_lzcnt_are_scans_on_this_cpu() {
    let mut machine = Machine::kernel();
    machine.cpu.gpr[1] = 0x0000_0100;
    machine.done(&[0xf3, 0x0f, 0xbd, 0xc1]);
    assert_eq!(machine.cpu.gpr[0], 8, "bsr, not a count of leading zeros");
}

#[test]
fn halted_cpu_stays_so_and_virtual_8086_mode_is_unknown() {
    let mut machine = Machine::kernel();
    assert_eq!(machine.run(&[0xf4]), Step::Halted);
    assert_eq!((machine.cpu.eip, machine.run(&[])), (CODE + 1, Step::Halted));
    machine.cpu.halted = false;
    machine.cpu.eflags |= crate::cpu::eflags::VM;
    assert!(matches!(machine.run(&[0x90]), Step::Unknown(_)));
}
