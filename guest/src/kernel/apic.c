/* Interrupt controllers: everything masked but the LAPIC's timer and what drivers ask for.
 *
 * Limits: the timer's input is taken as 1 GHz, which is what QEMU's and Umbra's LAPIC have; it is not measured. Nothing
 * that the guest prints depends on it. */
#include "apic.h"

#include "boot.h"
#include "cpu.h"
#include "irq.h"
#include "kpt.h"
#include "layout.h"

#define PIC1_MASK 0x21
#define PIC2_MASK 0xa1

#define LAPIC_PHYSICAL 0xfee00000
#define LAPIC_ID 0x020
#define LAPIC_TASK_PRIORITY 0x080
#define LAPIC_EOI 0x0b0
#define LAPIC_SPURIOUS 0x0f0
#define LAPIC_COMMAND 0x300
#define LAPIC_COMMAND_TO 0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_LVT_LINT1 0x360
#define LAPIC_TIMER_COUNT 0x380
#define LAPIC_TIMER_LEFT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0
#define LAPIC_ENABLE (1u << 8)
#define COMMAND_NMI (4u << 8)
#define COMMAND_INIT (5u << 8)
#define COMMAND_STARTUP (6u << 8)
#define COMMAND_PENDING (1u << 12)
#define COMMAND_ASSERT (1u << 14)
#define LVT_MASKED (1u << 16)
#define LVT_PERIODIC (1u << 17)
#define DIVIDE_BY_16 3
#define LAPIC_INPUT_HZ 1000000000u

#define IOAPIC_PHYSICAL 0xfec00000
#define IOAPIC2_PHYSICAL 0xfec10000
#define IOAPIC_SELECT 0x00
#define IOAPIC_DATA 0x10
#define IOAPIC_VERSION 1
#define IOAPIC_REDIRECTION 0x10

volatile u32 ticks;

static void lapic_write(u32 offset, u32 value) { *(volatile u32 *)(LAPIC_BASE + offset) = value; }
static u32 lapic_read(u32 offset) { return *(volatile u32 *)(LAPIC_BASE + offset); }

/* Redirection entry, low word. */
#define PIN_LEVEL (1u << 15)
#define PIN_NMI (4u << 8)
/* Redirection entry, high word. */
#define PIN_TO(id) ((id) << 24)
#define PIN_TO_ALL PIN_TO(0xffu)

#define PIT_PIN 2

/* Without a second IOAPIC virtio has the first one's pins from 5 on, as on QEMU's microvm. */
#define VIRTIO_FIRST_PIN_ALONE 5

static void ioapic_write(u32 base, u32 reg, u32 value)
{
    *(volatile u32 *)(base + IOAPIC_SELECT) = reg;
    *(volatile u32 *)(base + IOAPIC_DATA) = value;
}

static u32 ioapic_read(u32 base, u32 reg)
{
    *(volatile u32 *)(base + IOAPIC_SELECT) = reg;
    return *(volatile u32 *)(base + IOAPIC_DATA);
}

/* Where there is none, the bus reads as ones or as zeros. */
static bool ioapic_is_there(u32 base)
{
    u32 version = ioapic_read(base, IOAPIC_VERSION);
    return version != 0 && version != ~0u;
}

static void ioapic_mask_all(u32 base)
{
    u32 last = ioapic_read(base, IOAPIC_VERSION) >> 16 & 0xff;
    for (u32 i = 0; i <= last; i++)
        ioapic_write(base, IOAPIC_REDIRECTION + 2 * i, LVT_MASKED);
}

void apic_pit_as_nmi(bool on)
{
    if (smp)
        ioapic_write(IOAPIC_BASE, IOAPIC_REDIRECTION + 2 * PIT_PIN + 1, PIN_TO_ALL);
    ioapic_write(IOAPIC_BASE, IOAPIC_REDIRECTION + 2 * PIT_PIN, on ? PIN_NMI : LVT_MASKED);
}

void apic_unmask_virtio(u32 slot)
{
    bool second = ioapic_is_there(IOAPIC2_BASE);
    u32 pin = second ? slot : slot + VIRTIO_FIRST_PIN_ALONE, base = second ? IOAPIC2_BASE : IOAPIC_BASE;
    if (boot.cpu_count > 1)
        ioapic_write(base, IOAPIC_REDIRECTION + 2 * pin + 1, PIN_TO(cpu_self()->apic_id));
    ioapic_write(base, IOAPIC_REDIRECTION + 2 * pin, PIN_LEVEL | VECTOR_VIRTIO);
}

void apic_init(void)
{
    out8(PIC1_MASK, 0xff);
    out8(PIC2_MASK, 0xff);
    kpt_map_device(IOAPIC_BASE, IOAPIC_PHYSICAL);
    kpt_map_device(IOAPIC2_BASE, IOAPIC2_PHYSICAL);
    kpt_map_device(LAPIC_BASE, LAPIC_PHYSICAL);
    ioapic_mask_all(IOAPIC_BASE);
    if (ioapic_is_there(IOAPIC2_BASE))
        ioapic_mask_all(IOAPIC2_BASE);
    apic_init_local();
    if (boot.cpu_count > 1)
        cpu_self()->apic_id = apic_id();
}

void apic_init_local(void)
{
    lapic_write(LAPIC_LVT_LINT0, LVT_MASKED);
    lapic_write(LAPIC_LVT_LINT1, LVT_MASKED);
    lapic_write(LAPIC_TASK_PRIORITY, 0);
    lapic_write(LAPIC_SPURIOUS, LAPIC_ENABLE | VECTOR_SPURIOUS);
}

u32 apic_id(void) { return lapic_read(LAPIC_ID) >> 24; }

/* The two halves belong together; an NMI's handler sends nothing. */
static void command(u32 id, u32 what)
{
    while (lapic_read(LAPIC_COMMAND) & COMMAND_PENDING)
        pause();
    lapic_write(LAPIC_COMMAND_TO, id << 24);
    lapic_write(LAPIC_COMMAND, COMMAND_ASSERT | what);
}

/* Interrupts may be on, and their handlers send too. */
void apic_send(u32 id, u32 vector)
{
    irq_off();
    command(id, vector);
    irq_on();
}

void apic_send_nmi(u32 id) { command(id, COMMAND_NMI); }
void apic_send_init(u32 id) { command(id, COMMAND_INIT); }
void apic_send_startup(u32 id, u32 page) { command(id, COMMAND_STARTUP | page >> PAGE_SHIFT); }

void apic_delay(u32 microseconds)
{
    lapic_write(LAPIC_TIMER_DIVIDE, DIVIDE_BY_16);
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED);
    lapic_write(LAPIC_TIMER_COUNT, LAPIC_INPUT_HZ / 16 / 1000000 * microseconds);
    while (lapic_read(LAPIC_TIMER_LEFT))
        pause();
}

void apic_timer_start(u32 hz)
{
    lapic_write(LAPIC_TIMER_DIVIDE, DIVIDE_BY_16);
    lapic_write(LAPIC_LVT_TIMER, LVT_PERIODIC | VECTOR_TIMER);
    lapic_write(LAPIC_TIMER_COUNT, LAPIC_INPUT_HZ / 16 / hz);
}

void apic_end_of_interrupt(void) { lapic_write(LAPIC_EOI, 0); }
